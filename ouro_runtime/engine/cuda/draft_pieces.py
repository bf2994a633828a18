"""The pieces of a step with drafts, beside those of `cuda/pieces.py`. Pure torch.

Positions in flight of a request are on T lanes, one behind the other, each one loop or more ahead
of the next. So what a position reads of the one before it was written in an earlier pass, and the
lane of position p is free again when p + T may start. A lane that is read out early gives a draft:
it runs on, and the next lane of its request starts from the draft. After loop T it is read out for
good; if that is another token, the request's other lanes are dropped and the next one starts anew.

Other requests of such a step have one lane each, which does what it does in any step.
"""

from __future__ import annotations

import torch

from ouro_runtime.engine.cuda import pieces
from ouro_runtime.engine.cuda.backend import LaneShape
from ouro_runtime.engine.cuda.lanes import DRAFT_COLUMNS, DraftBuffers, LaneBuffers
from ouro_runtime.loop.drafts import CLASSES


def of(b: LaneBuffers) -> DraftBuffers:
    assert b.drafts is not None
    return b.drafts


def by_row(values: torch.Tensor, d: DraftBuffers) -> torch.Tensor:
    """Sums [lanes] int32 of `values` [lanes], by the lanes' requests."""
    total = torch.zeros(len(values), dtype=torch.int32, device=values.device)
    return total.index_add_(0, d.rows[: len(values)], values.to(torch.int32))


def begin(
    b: LaneBuffers,
    shape: LaneShape,
    states: torch.Tensor,
    lanes: int,
    block_table: torch.Tensor,
) -> None:
    """As `pieces.begin`; a drafted request's further lanes take up positions after its first's.

    Reads the packed `DraftLayout`, too, and `positions` of first lanes only.
    """
    d = of(b)
    columns = dict(zip(DRAFT_COLUMNS, d.packed(lanes), strict=True))
    columns["rows"] = columns["row"]
    for name, column in columns.items():
        getattr(d, name)[:lanes].copy_(column)
    rows, place, on = d.rows[:lanes], d.place[:lanes], d.on[:lanes]
    positions = b.positions[:lanes]
    positions.copy_(positions[rows] + place)

    pieces.take_up(b, states, lanes)
    request, again = b.request[:lanes], d.again[:lanes]
    further = place > 0
    alive = d.carried_alive[request] & again
    states = states[:lanes]
    held = (further & alive)[:, None]
    states.copy_(torch.where(held, b.carried_hidden[request], states))
    b.active[:lanes] &= alive | ~further
    d.drafted[:lanes].copy_(d.carried_drafted[request] * (on & again))
    d.draft[:lanes].copy_(d.carried_draft[request])
    b.depth[:lanes].copy_(d.drafted[:lanes])
    for brought in (d.made, d.dropped, d.waste, d.cells):
        brought[:lanes].zero_()
    pieces.enter(b, shape, lanes, block_table, rows)


def choose(b: LaneBuffers, shape: LaneShape, lanes: int) -> None:
    """After the gate: who is read out. Counts the cells of the pass.

    A drafted lane is, after loop T, and once before if its rule asks for it: the request's exit
    rule, or the classes of the gate's CDF that are set in `rule` (bit `loop * classes + class`).
    Never for a draft of the request's last token.
    """
    d = of(b)
    on, active, loop = d.on[:lanes], b.active[:lanes], b.loop[:lanes]
    cells = d.cells.view(-1)
    cells.index_add_(0, d.rows[:lanes] * shape.loops + loop, active.to(torch.int32))
    cdf = 1.0 - b.survival[:lanes]
    kind = torch.zeros_like(loop)
    for bound in CLASSES:
        kind += cdf >= bound
    bit = (loop * (len(CLASSES) + 1) + kind).clamp_max(31).long()
    asked = torch.bitwise_right_shift(d.rule[:lanes], bit) % 2 == 1
    leaves, read = b.exit_mask[:lanes], b.read_mask[:lanes]
    early = active & ~leaves & (d.drafted[:lanes] == 0) & (read | asked)
    early &= b.positions[:lanes] + 1 < b.limit[:lanes]
    read.copy_(torch.where(on, leaves | early, read))


def settle(
    b: LaneBuffers, shape: LaneShape, lanes: int, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take the `tokens` [lanes] of those read out: drafts are noted, final ones recorded, and
    whoever is dropped or starts is made ready for `advance`.

    Returns:
        Each [lanes], by request: whether it got a token, on which lane, and its place in the
        record.
    """
    d = of(b)
    on, active = d.on[:lanes], b.active[:lanes]
    read, leaves = b.read_mask[:lanes], b.exit_mask[:lanes] & on
    drafted, draft, done = d.drafted[:lanes], d.draft[:lanes], b.loop[:lanes] + 1
    right = leaves & (drafted > 0) & (draft == tokens)
    # Behind a token that ends its request nothing was started, nor is.
    ended = (tokens[:, None] == b.stops[:lanes]).any(1)
    wrong = by_row(leaves & ~right, d) > 0
    gone = on & active & ~leaves & wrong[d.rows[:lanes]]

    depth = torch.where(on, torch.where(right, drafted, done), b.depth[:lanes])
    final = read & (leaves | ~on)
    lane = torch.full_like(d.rows[:lanes], -1)
    numbers = b.numbers[:lanes]
    lane.scatter_reduce_(0, d.rows[:lanes], torch.where(final, numbers, -1), "amax")
    got, lane = lane >= 0, lane.clamp_min(0)
    place = b.record.add(numbers, got, tokens[lane], depth[lane])
    notes = (
        (d.made, (drafted * on)[lane]),
        (d.dropped, by_row(gone & (drafted > 0), d)),
        (d.waste, by_row(gone * done, d)),
    )
    for store, new in notes:
        flat = store.view(-1)
        flat[place] = torch.where(got, new, flat[place])
    history = b.record.history.view(-1, shape.loops)
    history[place] = torch.where(got[:, None], b.history[lane], history[place])

    early = read & on & ~leaves & ~gone
    drafted.copy_(torch.where(early, done, drafted))
    draft.copy_(torch.where(early, tokens, draft))
    _start(b, lanes, tokens, (early | (leaves & ~right)) & ~ended, leaves | gone)
    b.finished[:lanes] |= read & ended & ~on
    return got, lane, place


def _start(
    b: LaneBuffers, lanes: int, tokens: torch.Tensor, gives: torch.Tensor, free: torch.Tensor
) -> None:
    """Lanes that are `free` stop, and those after the ones that `gives` start from their tokens:
    they look to `advance` as if they had left the position before. All [lanes]."""
    d = of(b)
    on, active, before = d.on[:lanes], b.active[:lanes], d.before[:lanes]
    positions, read = b.positions[:lanes], b.read_mask[:lanes]
    starts = on & gives[before]
    positions.copy_(torch.where(starts, positions[before], positions))
    taken = torch.where(starts, tokens[before], torch.where(read, tokens, b.tokens[:lanes]))
    b.tokens[:lanes].copy_(taken)
    d.drafted[:lanes].masked_fill_(starts, 0)
    b.exit_mask[:lanes].copy_(torch.where(on, starts, b.exit_mask[:lanes]))
    active.copy_((active & ~free) | starts)


def carry(b: LaneBuffers, shape: LaneShape, states: torch.Tensor, lanes: int) -> None:
    """Put away all lanes as `advance` left them, by how far they are behind the oldest in flight;
    and what the host has to know of them, should they be dropped (`Flight`)."""
    d, record = of(b), b.record.first(lanes)
    on, alive, place = d.on[:lanes], b.active[:lanes], d.place[:lanes]
    count = record.count[d.rows[:lanes]]
    now = torch.where(on, (place - count) % shape.loops, place)
    slots = len(b.carried_loop) // shape.loops
    at = b.request[:lanes] + (now - place) * slots
    torch.mul(b.loop[:lanes], alive, out=record.end)
    torch.mul(1 - record.count, b.decoding[:lanes], out=record.rejected)
    drafted = d.drafted[:lanes] * (on & alive)
    for store, value in (
        (b.carried_loop, record.end),
        (b.carried_hidden, states[:lanes]),
        (b.carried_survival, b.survival[:lanes]),
        (b.carried_history, b.history[:lanes]),
        (d.carried_alive, alive),
        (d.carried_drafted, drafted),
        (d.carried_draft, d.draft[:lanes]),
    ):
        store.index_copy_(0, at, value)
    oldest = on & (now == 0)
    flight = (
        record.end * (on & ~oldest),
        (drafted > 0) & ~oldest,
        drafted * oldest,
        d.draft[:lanes] * (oldest & (drafted > 0)),
    )
    for column, value in enumerate(flight):
        d.flight[:lanes, column].copy_(by_row(value, d))


def packed(b: LaneBuffers, requests: int) -> torch.Tensor:
    """What `StepRecord.packed` holds, then what only steps with drafts record: [R, ...] int32."""
    d = of(b)
    parts = (d.made, d.dropped, d.waste, d.cells, d.flight)
    record = b.record.first(requests).packed()
    return torch.cat([record, *(part[:requests] for part in parts)], dim=1)
