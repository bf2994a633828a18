"""The pieces a step over lanes is made of, in memory that never moves.

Each piece is the same launches every time it runs, whatever the requests ask for: who does what is
in masks and numbers on the device, and even the number of the pass is kept there. So each is
captured once as a CUDA graph (`cuda/graphs.py`), and a step is a handful of replays. Pure torch.

`states` are the lanes' hidden states [lanes or more, H]: rows of the pass itself, or a copy of the
heads in a batch with prompt chunks.
"""

from __future__ import annotations

import torch

from ouro_kernels import exit_gate, next_pass
from ouro_runtime.engine.cuda.backend import LaneShape
from ouro_runtime.engine.cuda.lanes import LaneBuffers, LaneParams


def begin(
    b: LaneBuffers,
    shape: LaneShape,
    states: torch.Tensor,
    lanes: int,
    block_table: torch.Tensor,
) -> None:
    """Lanes take up where they were left; all that changes in a step is set.

    Reads the packed `LaneParams`, `positions`, and `states` of lanes at loop 0.

    Args:
        block_table: [T, R, B] int32, by loop, the page of each request's n-th block.
    """
    take_up(b, states, lanes)
    enter(b, shape, lanes, block_table, b.numbers[:lanes])


def take_up(b: LaneBuffers, states: torch.Tensor, lanes: int) -> None:
    """The lanes' state, as they were left; nothing of the step was brought yet."""
    f = LaneParams.unpack(b.packed(lanes))
    record = b.record.first(lanes)
    request = b.request[:lanes]
    request.copy_(f["slot"])
    loop, active = b.loop[:lanes], b.active[:lanes]
    torch.mul(b.carried_loop[request], f["decoding"], out=loop)
    deep = loop > 0
    states = states[:lanes]
    states.copy_(torch.where(deep[:, None], b.carried_hidden[request], states))
    b.survival[:lanes].copy_(b.carried_survival[request].masked_fill_(~deep, 1.0))
    b.history[:lanes].copy_(b.carried_history[request])
    for name in (
        "limit",
        "threshold",
        "run_all",
        "decoding",
        "temperature",
        "seed",
        "stops",
        "deepest",
    ):
        getattr(b, name)[:lanes].copy_(f[name])
    b.finished[:lanes].copy_(f["once"])
    b.depth[:lanes].zero_()
    b.step.zero_()
    b.low[:lanes].copy_(f["low"][0])
    b.high[:lanes].copy_(f["high"][0])
    torch.lt(b.positions[:lanes], b.limit[:lanes], out=active)
    record.start.copy_(loop)
    for brought in (record.tokens, record.depths, record.count):
        brought.zero_()


def enter(
    b: LaneBuffers, shape: LaneShape, lanes: int, block_table: torch.Tensor, rows: torch.Tensor
) -> None:
    """Where the active lanes' first cells read and write K/V.

    Args:
        rows: [lanes] int64, each lane's row of the block table.
    """
    loop, active, positions = b.loop[:lanes], b.active[:lanes], b.positions[:lanes]
    # What pads has any position.
    block = torch.div(positions, shape.block_size, rounding_mode="floor")
    block.clamp_(0, block_table.shape[2] - 1)
    slots = block_table[loop.long(), rows, block].long() * shape.block_size
    slots += positions % shape.block_size
    b.slots[:lanes].copy_(slots.masked_fill_(~active, -1))
    b.seq_lens[:lanes].copy_((positions + 1) * active)
    b.fill_copies[:lanes].copy_((b.deepest[:lanes] - 1 - loop) * (active & ~b.run_all[:lanes]))


def gate(b: LaneBuffers, shape: LaneShape, states: torch.Tensor, lanes: int) -> None:
    """The exit rule on the states after a pass; sets the two masks."""
    exit_gate(
        states[:lanes],
        shape.gate_weight,
        shape.gate_bias,
        b.survival[:lanes],
        b.depth[:lanes],
        b.loop[:lanes],
        b.threshold[:lanes],
        b.low[:lanes],
        b.high[:lanes],
        shape.loops,
        run_all=b.run_all[:lanes],
        active=b.active[:lanes],
        exit_mask=b.exit_mask[:lanes],
        read_mask=b.read_mask[:lanes],
        history=b.history[:lanes],
        deepest=b.deepest[:lanes],
    )


def remember(b: LaneBuffers, lanes: int) -> None:
    """Keep the survival of all lanes as of this pass."""
    b.record.history[:lanes].index_copy_(1, b.step, b.history[:lanes, None])


def take(
    b: LaneBuffers, lanes: torch.Tensor, read: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """Those of `lanes` [M] that were `read` [M] take their `tokens` [M]; places in the record."""
    place = b.record.add(lanes, read, tokens, b.depth[lanes])
    b.tokens[lanes] = torch.where(read, tokens, b.tokens[lanes])
    ended = (tokens[:, None] == b.stops[lanes]).any(1)
    b.finished[lanes] |= read & ended
    return place


def advance(
    b: LaneBuffers,
    shape: LaneShape,
    states: torch.Tensor,
    lanes: int,
    embedding: tuple[torch.Tensor, torch.Tensor],
    block_table: torch.Tensor,
    rows: torch.Tensor | None = None,
) -> None:
    """Every lane to its next cell: one loop deeper, or its token's position at loop 1.

    Args:
        embedding: a table [V, H], and the entries of it [lanes] that embed the lanes' tokens.
        rows: [lanes] int32, each lane's row of the block table; None: its own number.
    """
    table, entries = embedding
    next_pass(
        states[:lanes],
        entries,
        table,
        b.exit_mask[:lanes],
        b.active[:lanes],
        b.loop[:lanes],
        b.positions[:lanes],
        b.survival[:lanes],
        b.depth[:lanes],
        block_table,
        b.slots[:lanes],
        b.seq_lens[:lanes],
        shape.block_size,
        finished=b.finished[:lanes],
        position_limit=b.limit[:lanes],
        row_to_request=rows,
        run_all=b.run_all[:lanes],
        fill_copies=b.fill_copies[:lanes],
        deepest=b.deepest[:lanes],
    )
    b.step.add_(1)
    if rows is not None:
        b.step.clamp_max_(shape.loops - 1)  # a step with drafts also advances after its last pass
    for now, by_pass in zip((b.low, b.high), LaneParams.limits(b.packed(lanes)), strict=True):
        torch.index_select(by_pass, 0, b.step, out=now[None, :lanes])


def carry(b: LaneBuffers, states: torch.Tensor, lanes: int) -> None:
    """Put away, by request slot, the lanes that are not through their column."""
    request, record = b.request[:lanes], b.record.first(lanes)
    stays = b.decoding[:lanes] & b.active[:lanes] & ~b.exit_mask[:lanes]
    torch.mul(b.loop[:lanes] + 1, stays, out=record.end)
    torch.mul(1 - record.count, b.decoding[:lanes], out=record.rejected)
    b.carried_loop.index_copy_(0, request, record.end)
    b.carried_hidden.index_copy_(0, request, states[:lanes])
    b.carried_survival.index_copy_(0, request, b.survival[:lanes])
    b.carried_history.index_copy_(0, request, b.history[:lanes])
