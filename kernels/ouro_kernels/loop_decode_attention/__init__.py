"""Decode attention over pages by loop, for cells of mixed requests and loops."""

import torch

from ouro_kernels._backend import backend
from ouro_kernels._checks import FLOATS, check, check_caches, check_optional, require

_PROGRAMS = 4 * 132  # a few per multiprocessor of a Hopper card
_MAX_SPLITS = 32
_MIN_SPAN = 128  # positions under which a split costs more than it hides


def choose_splits(rows: int, kv_heads: int, max_seq_len: int) -> int:
    """How many ways to split the K/V positions: a power of two, from shapes alone.

    Never from lengths on the device, so a captured graph has one grid for all its replays.
    """
    wanted = _PROGRAMS // max(rows * kv_heads, 1)
    useful = max_seq_len // _MIN_SPAN
    splits = max(min(wanted, useful, _MAX_SPLITS), 1)
    return 1 << (splits.bit_length() - 1)


def loop_decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    loop: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    row_to_request: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    num_splits: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one query per row over its own loop's pages; returns [N, Hq, D].

    q [N, Hq, D]. k_cache, v_cache: views [pages, block_size, Hkv, D] of any strides, D dense, of
    q's dtype or float8_e4m3fn (then k_scale and v_scale, fp32 device scalars). Hq is a multiple of
    Hkv. block_table [T, R, max_blocks] int32: row n reads the pages block_table[loop[n], r], loop
    int32 [N], of request r = row_to_request[n] (int32 [N]; default n).
    seq_lens [N] int32: positions to read, the row's own included (its K/V must be written). A row
    of length 0 is padding: its output is zeros, its q and table are not read.
    num_splits: default `choose_splits` for the table's full width.
    """
    check("q", q, (None, None, None), FLOATS, q.device)
    rows, q_heads, head_dim = q.shape
    device = q.device
    check_caches(k_cache, v_cache, head_dim, q.dtype, (k_scale, v_scale), device)
    kv_heads = k_cache.shape[2]
    grouped = kv_heads > 0 and q_heads % kv_heads == 0
    require(grouped, "q", f"{q_heads} heads are no multiple of {kv_heads} K/V heads")
    check("block_table", block_table, (None, None, None), torch.int32, device)
    check("loop", loop, (rows,), torch.int32, device)
    check("seq_lens", seq_lens, (rows,), torch.int32, device)
    check_optional("row_to_request", row_to_request, (rows,), torch.int32, device)
    if row_to_request is None:
        fits = block_table.shape[1] >= rows
        require(fits, "block_table", f"{block_table.shape[1]} rows for {rows} queries")
    check_optional("out", out, (rows, q_heads, head_dim), q.dtype, device)
    if num_splits is None:
        num_splits = choose_splits(rows, kv_heads, block_table.shape[2] * k_cache.shape[1])
    power = num_splits >= 1 and num_splits & (num_splits - 1) == 0
    require(power, "num_splits", f"must be a power of two, got {num_splits}")
    return backend("loop_decode_attention", q).loop_decode_attention(
        q,
        k_cache,
        v_cache,
        block_table,
        loop,
        seq_lens,
        scale,
        row_to_request,
        k_scale,
        v_scale,
        num_splits,
        out,
    )
