"""RoPE and the paged write, in plain PyTorch."""

import torch

FP8_MAX = 448.0


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.float().chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)


def _stored(x: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    if scale is None:
        return x
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(dtype)


def rope_kv_write(
    qkv,
    cos_sin,
    positions,
    slot_mapping,
    k_cache,
    v_cache,
    k_scale=None,
    v_scale=None,
    fill_copies=None,
    q_out=None,
    block_table=None,
    loop=None,
    row_to_request=None,
):
    rows = qkv.shape[0]
    _, block_size, kv_heads, head_dim = k_cache.shape
    heads = qkv.unflatten(1, (-1, head_dim))
    q_heads = heads.shape[1] - 2 * kv_heads
    if q_out is None:
        q_out = torch.empty(rows, q_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    live = (slot_mapping >= 0).nonzero().squeeze(1)
    heads, slots = heads[live], slot_mapping[live]
    cos, sin = cos_sin[positions[live]].float().unsqueeze(1).chunk(2, dim=-1)
    q, k, v = heads.split((q_heads, kv_heads, kv_heads), dim=1)
    q_out[live] = _rotate(q, cos, sin)
    k = _stored(_rotate(k, cos, sin), k_scale, k_cache.dtype)
    v = _stored(v, v_scale, v_cache.dtype)
    copies = torch.zeros_like(slots) if fill_copies is None else fill_copies[live].long()
    for j in range(int(copies.max()) + 1 if len(live) else 0):
        rows_j = copies >= j
        pages, offset = slots[rows_j] // block_size, slots[rows_j] % block_size
        if j:
            at = live[rows_j]
            request = at if row_to_request is None else row_to_request[at].long()
            pages = block_table[loop[at].long() + j, request, positions[at] // block_size].long()
        # fp8 has no index assignment on every build; the bytes do.
        for cache, new in ((k_cache, k), (v_cache, v)):
            same = torch.uint8 if cache.dtype.itemsize == 1 else cache.dtype
            cache.view(same)[pages, offset] = new[rows_j].view(same)
    return q_out
