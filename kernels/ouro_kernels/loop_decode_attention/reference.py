"""Row by row: gather the pages, soft-max, in fp32."""

import torch


def _gather(cache, pages, length, scale):
    seen = cache[pages].flatten(0, 1)[:length].float()
    return seen if scale is None else seen * scale


def loop_decode_attention(
    q,
    k_cache,
    v_cache,
    block_table,
    loop,
    seq_lens,
    scale,
    row_to_request=None,
    k_scale=None,
    v_scale=None,
    num_splits=None,
    out=None,
):
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    block_size, kv_heads = k_cache.shape[1:3]
    for row, length in enumerate(seq_lens.tolist()):
        if length <= 0:
            out[row] = 0
            continue
        request = row if row_to_request is None else int(row_to_request[row])
        pages = block_table[loop[row], request, : -(-length // block_size)].long()
        k = _gather(k_cache, pages, length, k_scale)
        v = _gather(v_cache, pages, length, v_scale)
        grouped = q[row].float().unflatten(0, (kv_heads, -1))
        weights = torch.einsum("hgd,shd->hgs", grouped, k).mul(scale).softmax(-1)
        out[row] = torch.einsum("hgs,shd->hgd", weights, v).flatten(0, 1).to(out.dtype)
    return out
