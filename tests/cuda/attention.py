"""What vLLM's two Triton attention kernels do, in torch: a hundred times faster than interpreted.

They read what the kernels read (`bench.py` says when the kernels themselves run): the metadata of a
pass, the pages of a cache of layout LBHNC.
"""

from __future__ import annotations

from typing import Any

import torch


def write_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *scales: Any,
) -> None:
    """In the place of `triton_reshape_and_cache_flash`; caches [pages, block_size, heads, size]."""
    written = slot_mapping >= 0
    slots, size = slot_mapping[written], key_cache.shape[1]
    count = len(slot_mapping)
    key_cache[slots // size, slots % size] = key[:count][written]
    value_cache[slots // size, slots % size] = value[:count][written]


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    seqused_k: torch.Tensor,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    block_table: torch.Tensor,
    **options: Any,
) -> None:
    """In the place of `unified_attention`: runs of rows, each the end of its sequence."""
    assert causal and options["window_size"] == (-1, -1) and not options["softcap"]
    first, lengths = cu_seqlens_q.tolist(), seqused_k.tolist()
    assert max_seqlen_k >= max(lengths), "the host's bound is under a length"
    group = q.shape[1] // k.shape[2]
    for request, length in enumerate(lengths):
        rows = slice(first[request], first[request + 1])
        count = rows.stop - rows.start
        assert count <= max_seqlen_q
        if not length:
            # An idle lane: nobody reads what comes out.
            out[rows] = torch.nan
            continue
        pages = block_table[request, : -(-length // k.shape[1])].long()
        keys, values = (
            cache[pages].flatten(0, 1)[:length].repeat_interleave(group, dim=1).transpose(0, 1)
            for cache in (k, v)
        )
        scores = softmax_scale * (q[rows].transpose(0, 1) @ keys.transpose(1, 2))
        last = length - count + torch.arange(count)
        hidden = torch.arange(length)[None, :] > last[:, None]
        out[rows] = (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values).transpose(0, 1)
