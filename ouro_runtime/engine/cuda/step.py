"""A step on the device: T passes without reading anything back. Pure torch.

The counterpart of `ouro_runtime.loop.executor` where the host must not wait: rows keep their
places for the whole step, so the number of rows of a pass is known on the host, and who leaves is
a mask on the device. Prompt rows run loop t in pass t. A lane runs wherever it is; when it leaves,
its token's position takes its place.

What runs the passes is a `LaneBackend`.
"""

from __future__ import annotations

import torch

from ouro_kernels import exit_gate, next_pass
from ouro_runtime.engine.cuda.backend import LaneBackend, LaneShape, RowView, StepInputs
from ouro_runtime.engine.cuda.lanes import LaneBuffers, LaneParams, StepRecord


def apply_gate(buffers: LaneBuffers, shape: LaneShape, hidden: torch.Tensor, lanes: int) -> None:
    """The exit rule on the states [lanes, H] of the first `lanes` lanes; sets the two masks."""
    b = buffers
    exit_gate(
        hidden,
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
    )


class LaneStep:
    """One step. `run` it, then read `record`; `deferred` holds the states still to be sampled.

    Args:
        lanes: R, padded to a graph bucket when N = R (lanes past R are inactive).
    """

    def __init__(
        self,
        buffers: LaneBuffers,
        shape: LaneShape,
        inputs: StepInputs,
        backend: LaneBackend,
        lanes: int | None = None,
    ) -> None:
        self.b, self.shape, self.inputs, self.backend = buffers, shape, inputs, backend
        self.lanes = len(inputs.slots)
        self.width = lanes or self.lanes
        self.rows = len(inputs.positions)
        self.record = StepRecord.empty(self.lanes, shape.loops, buffers.device)
        self.deferred: torch.Tensor | None = None
        self._mixed = inputs.head_rows is not None
        self._fields = LaneParams.unpack(inputs.params)

    def run(self) -> torch.Tensor:
        """All passes. Returns the rows' states [padded or R, H] after the last one."""
        loops = self.shape.loops
        self._begin()
        for step in range(loops):
            filled = self._pass(step)
            self._leave(step, filled)
            self._read_out(step)
            if step + 1 < loops:
                self._advance(step)
        self._carry()
        return self.b.hidden[: self.inputs.padded if self._mixed else self.lanes]

    # ---- parts of a step ------------------------------------------------------------------------

    def _begin(self) -> None:
        b, x, f, n = self.b, self.inputs, self._fields, self.lanes
        block, loops = self.shape.block_size, self.shape.loops
        page = torch.div(x.logical, block, rounding_mode="floor")
        first = torch.where(x.logical >= 0, (page * (loops - 1)) * block + x.logical, -1)
        b.hidden[: self.rows].copy_(x.embedded)
        heads = b.numbers[:n] if x.head_rows is None else x.head_rows
        if self._mixed:
            b.row_positions[: self.rows].copy_(x.positions)
            b.row_slots[: x.padded].fill_(-1)
            b.row_slots[: self.rows].copy_(first)
        zero = torch.zeros_like(b.loop[:n])
        loop = torch.where(f["decoding"], b.carried_loop[x.slots], zero) if x.plan.carried else zero
        if x.plan.carried:
            deep = (loop > 0)[:, None]
            states = torch.where(deep, b.carried_hidden[x.slots], b.hidden[heads])
            b.hidden.index_copy_(0, heads, states)
            survival = torch.where(loop > 0, b.carried_survival[x.slots], 1.0)
            b.survival[:n].copy_(survival)
            b.history[:n].copy_(b.carried_history[x.slots])
        else:
            b.survival[:n].fill_(1.0)
        b.loop[:n].copy_(loop)
        self.record.start.copy_(loop)
        b.positions[:n].copy_(x.positions[heads])
        b.tokens[:n].copy_(x.input_ids[heads])
        b.limit[:n].copy_(f["limit"])
        b.threshold[:n].copy_(f["threshold"])
        b.run_all[:n].copy_(f["run_all"])
        b.finished[:n].copy_(f["once"])
        b.depth[:n].zero_()
        b.active[n : self.width].fill_(False)
        b.active[:n].copy_(b.positions[:n] < b.limit[:n])
        active = b.active[:n]
        slots = torch.where(active, first[heads] + loop * block, -1)
        b.slots[n : self.width].fill_(-1)
        b.slots[:n].copy_(torch.where(first[heads] >= 0, slots, -1))
        b.seq_lens[n : self.width].zero_()
        b.seq_lens[:n].copy_(torch.where(active, b.positions[:n] + 1, 0))
        b.fill_copies[n : self.width].zero_()
        copies = torch.where(active & ~f["run_all"], loops - 1 - loop, zero)
        b.fill_copies[:n].copy_(copies)
        if self._mixed:
            b.row_slots.index_copy_(0, heads, b.slots[:n])
            self._reach = b.positions[:n].to(torch.int32) + 1
        self._mask_stopped(0)

    def _pass(self, step: int) -> bool:
        b, f, n = self.b, self._fields, self.lanes
        if step == 0 or self.inputs.plan.moving:
            b.low[:n].copy_(f["low"][step])
            b.high[:n].copy_(f["high"][step])
        if not self._mixed:
            return self.backend.run_lanes(self.width, self.inputs.block_table)
        decoding = f["decoding"]
        # A request that is being filled in is at loop `step` in all its rows, even when its head
        # has left already.
        view = RowView(
            self.rows,
            self.inputs.padded,
            b.row_positions[: self.inputs.padded],
            b.row_slots[: self.inputs.padded],
            torch.where(decoding, b.loop[:n], step),
            torch.where(decoding, b.seq_lens[:n], self._reach),
        )
        self.backend.run_rows(view)
        torch.index_select(b.hidden, 0, self.inputs.head_rows, out=b.lane_hidden[:n])
        apply_gate(b, self.shape, b.lane_hidden[:n], n)
        return False

    def _leave(self, step: int, filled: bool) -> None:
        """Stand-ins of the rows that leave after this pass."""
        b, n, stop = self.b, self.lanes, self.inputs.row_stop
        if not filled and len(self.inputs.plan.candidates[step]):
            self.backend.stand_in(b.slots[:n], b.loop[:n], b.exit_mask[:n])
        if stop is not None and step + 1 < self.shape.loops:
            slots = b.row_slots[: self.rows] if self._mixed else b.slots[:n]
            self.backend.stand_in(slots, torch.full_like(stop, step), stop == step + 1)

    def _read_out(self, step: int) -> None:
        lanes = self.inputs.candidates[step]
        if lanes is None:
            return
        b, record = self.b, self.record
        source = b.lane_hidden if self._mixed else b.hidden
        hidden, read, depth = source[lanes], b.read_mask[lanes], b.depth[lanes]
        record.history[:, step].copy_(b.history[: self.lanes])
        defer = self.inputs.defer
        if defer is not None:
            if self.deferred is None:
                self.deferred = source.new_zeros(self.lanes, source.shape[1])
            late = (read & defer[lanes])[:, None]
            self.deferred[lanes] = torch.where(late, hidden, self.deferred[lanes])
        tokens = self.backend.sample(lanes, self.backend.logits(hidden), step, b.positions[lanes])
        place = record.add(lanes, read, tokens, depth)
        b.tokens[lanes] = torch.where(read, tokens, b.tokens[lanes])
        ended = (tokens[:, None] == self._fields["stops"][lanes]).any(1)
        b.finished[lanes] |= read & ended
        now = read if defer is None else read & ~defer[lanes]
        self.backend.sampled(lanes, now, tokens, place)

    def _advance(self, step: int) -> None:
        """Every lane to its next cell: one loop deeper, or its token's position at loop 1."""
        b, w, n = self.b, self.width, self.lanes
        hidden = b.lane_hidden[:w] if self._mixed else b.hidden[:w]
        table, rows = self.backend.embedding(b.tokens[:w])
        next_pass(
            hidden,
            rows,
            table,
            b.exit_mask[:w],
            b.active[:w],
            b.loop[:w],
            b.positions[:w],
            b.survival[:w],
            b.depth[:w],
            self.inputs.block_table[:w],
            b.slots[:w],
            b.seq_lens[:w],
            self.shape.block_size,
            self.shape.loops,
            finished=b.finished[:w],
            position_limit=b.limit[:w],
            run_all=b.run_all[:w],
            fill_copies=b.fill_copies[:w],
        )
        if self._mixed:
            heads = self.inputs.head_rows
            assert heads is not None
            slots = b.row_slots[: self.inputs.padded]
            slots.copy_(torch.where(slots >= 0, slots + self.shape.block_size, -1))
            b.hidden.index_copy_(0, heads, b.lane_hidden[:n])
            b.row_positions.index_copy_(0, heads, b.positions[:n])
            b.row_slots.index_copy_(0, heads, b.slots[:n])
        self._mask_stopped(step + 1)

    def _mask_stopped(self, step: int) -> None:
        """Rows past their last loop write nothing: their stand-ins are in place."""
        stop = self.inputs.row_stop
        if stop is None:
            return
        slots = self.b.row_slots if self._mixed else self.b.slots
        slots[: self.rows].masked_fill_(stop <= step, -1)

    def _carry(self) -> None:
        """Put away, by request slot, the lanes that are not through their column."""
        b, x, n = self.b, self.inputs, self.lanes
        stays = self._fields["decoding"] & b.active[:n] & ~b.exit_mask[:n]
        self.record.end.copy_(torch.where(stays, b.loop[:n] + 1, 0))
        b.carried_loop.index_copy_(0, x.slots, self.record.end)
        if x.plan.carries:
            source = b.lane_hidden if self._mixed else b.hidden
            b.carried_hidden.index_copy_(0, x.slots, source[:n])
            b.carried_survival.index_copy_(0, x.slots, b.survival[:n])
            b.carried_history.index_copy_(0, x.slots, b.history[:n])
