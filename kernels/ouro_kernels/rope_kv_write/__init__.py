"""RoPE on q and k, and K and V written into each cell's own loop page, from packed qkv."""

import torch

from ouro_kernels._backend import backend
from ouro_kernels._checks import FLOATS, INTS, check, check_caches, check_optional, require


def rope_kv_write(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    fill_copies: torch.Tensor | None = None,
    q_out: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    loop: torch.Tensor | None = None,
    row_to_request: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return q [N, Hq, D] after RoPE; write K (after RoPE) and V to the rows' slots.

    qkv [N, (Hq + 2 Hkv) D], packed q, k, v. cos_sin [max_position, D]: cosines of the D / 2
    frequencies, then sines (vLLM's `cos_sin_cache`). Rotate-half; fp32 inside, rounded once.
    k_cache, v_cache: views [pages, block_size, Hkv, D] of any strides, D dense; of qkv's dtype or
    float8_e4m3fn. An fp8 cache holds clamp(k / k_scale, +-448); the scales are fp32 device scalars.
    slot_mapping [N] int64; a row whose slot is negative is skipped: neither caches nor q_out are
    written (and its position is not read).

    fill_copies [N] int32: stand-in copies for the deeper loops. They are written for the same
    position of the same request (`row_to_request` int32 [N]; default the row's number) to the pages
    that block_table [T, R, max_blocks] int32 has for loops loop + 1 .. loop + fill_copies (loop
    int32 [N], 0-based, the row's own); not where that is the row's own page. A row that may leave
    at any loop passes T - 1 - loop, a prompt row 0; then an exit has nothing left to do.
    """
    check("qkv", qkv, (None, None), FLOATS, qkv.device)
    rows, device = qkv.shape[0], qkv.device
    head_dim = cos_sin.shape[-1]
    check("cos_sin", cos_sin, (None, None), FLOATS, device)
    require(head_dim % 2 == 0, "cos_sin", f"head size must be even, got {head_dim}")
    check("positions", positions, (rows,), INTS, device)
    check("slot_mapping", slot_mapping, (rows,), torch.int64, device)
    check_caches(k_cache, v_cache, head_dim, qkv.dtype, (k_scale, v_scale), device)
    kv_heads = k_cache.shape[2]
    q_heads = qkv.shape[1] // head_dim - 2 * kv_heads
    packs = q_heads > 0 and qkv.shape[1] == (q_heads + 2 * kv_heads) * head_dim
    require(packs, "qkv", f"width {qkv.shape[1]} does not fit {kv_heads} K/V heads of {head_dim}")
    check_optional("fill_copies", fill_copies, (rows,), torch.int32, device)
    if fill_copies is not None:
        if block_table is None or loop is None:
            raise ValueError("fill_copies: needs block_table and loop")
        check("block_table", block_table, (None, None, None), torch.int32, device)
        check("loop", loop, (rows,), torch.int32, device)
        check_optional("row_to_request", row_to_request, (rows,), torch.int32, device)
    check_optional("q_out", q_out, (rows, q_heads, head_dim), qkv.dtype, device)
    return backend("rope_kv_write", qkv).rope_kv_write(
        qkv,
        cos_sin,
        positions,
        slot_mapping,
        k_cache,
        v_cache,
        k_scale,
        v_scale,
        fill_copies,
        q_out,
        block_table,
        loop,
        row_to_request,
    )
