"""Next-pass assembly: turn the state of one pass's rows into the inputs of the next, in place."""

import torch

from ouro_kernels._backend import backend
from ouro_kernels._checks import FLOATS, INTS, check, check_optional, require


def next_pass(
    hidden: torch.Tensor,
    tokens: torch.Tensor,
    embedding: torch.Tensor,
    exit_mask: torch.Tensor,
    active: torch.Tensor,
    loop: torch.Tensor,
    positions: torch.Tensor,
    survival: torch.Tensor,
    depth: torch.Tensor,
    block_table: torch.Tensor,
    slot_mapping: torch.Tensor,
    seq_lens: torch.Tensor,
    block_size: int,
    finished: torch.Tensor | None = None,
    position_limit: torch.Tensor | None = None,
    row_to_request: torch.Tensor | None = None,
    run_all: torch.Tensor | None = None,
    fill_copies: torch.Tensor | None = None,
    deepest: torch.Tensor | None = None,
) -> None:
    """Advance N rows by one pass. Everything is updated in place and nothing is returned.

    State, in and out: hidden [N, H] (the normed state), active bool [N], loop int32 [N] (0-based),
    positions int32 or int64 [N], survival fp32 [N], depth int32 [N].
    Read: tokens int32 or int64 [N] (just sampled; looked at where exit_mask is set), embedding
    [V, H], exit_mask bool [N] (of `exit_gate`), block_table int32 [T, R, max_blocks],
    row_to_request int32 [N] (default: the row's number).
    Written: slot_mapping int64 [N] (in the new loop's page), seq_lens int32 [N] (the new cell's own
    position included), and if given fill_copies int32 [N] (`rope_kv_write`'s: D - 1 - loop, where D
    is `deepest` int32 [N], T if it is not given; 0 for rows of `run_all`).

    A row that stays keeps its hidden state and goes one loop deeper. A row that leaves starts the
    next position: loop 0, survival 1, depth 0, hidden = embedding[token]; unless it is
    `finished` (bool [N]: end token, no token wanted) or the new position reaches
    position_limit (positions' dtype [N]: the first position without a slot). Such a row moves to
    the next position too but becomes inactive, and its hidden state stays.
    Rows that are not active, before or after: slot -1, seq_len 0, fill_copies 0.
    """
    check("hidden", hidden, (None, None), FLOATS, hidden.device)
    rows, size = hidden.shape
    device = hidden.device
    check("tokens", tokens, (rows,), INTS, device)
    check("embedding", embedding, (None, size), hidden.dtype, device)
    check("exit_mask", exit_mask, (rows,), torch.bool, device)
    check("active", active, (rows,), torch.bool, device)
    check("positions", positions, (rows,), INTS, device)
    check("survival", survival, (rows,), torch.float32, device)
    check("slot_mapping", slot_mapping, (rows,), torch.int64, device)
    check("block_table", block_table, (None, None, None), torch.int32, device)
    for name, tensor in (("loop", loop), ("depth", depth), ("seq_lens", seq_lens)):
        check(name, tensor, (rows,), torch.int32, device)
    for name, tensor in (
        ("row_to_request", row_to_request),
        ("fill_copies", fill_copies),
        ("deepest", deepest),
    ):
        check_optional(name, tensor, (rows,), torch.int32, device)
    for name, tensor in (("finished", finished), ("run_all", run_all)):
        check_optional(name, tensor, (rows,), torch.bool, device)
    check_optional("position_limit", position_limit, (rows,), positions.dtype, device)
    if row_to_request is None:
        fits = block_table.shape[1] >= rows
        require(fits, "block_table", f"{block_table.shape[1]} rows for {rows} cells")
    require(block_size >= 1, "block_size", f"must be at least 1, got {block_size}")
    backend("next_pass", hidden).next_pass(
        hidden,
        tokens,
        embedding,
        exit_mask,
        active,
        loop,
        positions,
        survival,
        depth,
        block_table,
        slot_mapping,
        seq_lens,
        block_size,
        finished,
        position_limit,
        row_to_request,
        run_all,
        fill_copies,
        deepest,
    )
