"""A step on the device: T passes without reading anything back. Pure torch.

The counterpart of `ouro_runtime.loop.executor` where the host must not wait: rows keep their
places for the whole step, so the number of rows of a pass is known on the host, and who leaves is
a mask on the device. Prompt rows run loop t in pass t. A lane runs wherever it is; when it leaves,
its token's position takes its place.

In a step with drafts a drafted request has T lanes (`cuda/draft_pieces.py`).

A step plays the pieces of `cuda/pieces.py` in order. What plays them is a `LaneBackend`.
"""

from __future__ import annotations

import torch

from ouro_runtime.engine.cuda import draft_pieces, pieces
from ouro_runtime.engine.cuda.backend import LaneBackend, LaneShape, RowView, StepInputs
from ouro_runtime.engine.cuda.lanes import LaneBuffers


class LaneStep:
    """One step. `run` it, then read `record`; `deferred` holds the states still to be sampled.

    Args:
        width: R, padded to a graph bucket when N = R (lanes past R are inactive); the packed
            parameters have as many columns.
    """

    def __init__(
        self,
        buffers: LaneBuffers,
        shape: LaneShape,
        inputs: StepInputs,
        backend: LaneBackend,
        width: int,
    ) -> None:
        self.b, self.shape, self.inputs, self.backend = buffers, shape, inputs, backend
        self.lanes, self.width = inputs.lanes, width
        self.rows = len(inputs.positions)
        requests = self.lanes if inputs.head_rows is not None else self.rows
        self.record = buffers.record.first(requests)
        self.deferred: torch.Tensor | None = None
        self._mixed = inputs.head_rows is not None
        self._states = buffers.lane_hidden if self._mixed else buffers.hidden

    def run(self) -> torch.Tensor:
        """All passes. Returns the rows' states [padded or R, H] after the last one."""
        loops = self.shape.loops
        self._load()
        self._play("begin")
        for step in range(loops):
            self._place_rows(step)
            self._pass(step)
            self._leave(step)
            self._read_out(step)
            if step + 1 < loops or self.inputs.drafts:
                self._play("advance")
        self._play("carry")
        return self.b.hidden[: self.inputs.padded if self._mixed else self.rows]

    # ---- parts of a step ------------------------------------------------------------------------

    def _play(self, piece: str) -> None:
        name = f"draft_{piece}" if self.inputs.drafts else piece
        self.backend.play(name, self.width, self._mixed)

    def _load(self) -> None:
        """Rows and lanes at loop 1."""
        b, x, n = self.b, self.inputs, len(self.record.count)
        b.hidden[: self.rows].copy_(x.embedded)
        heads = x.head_rows
        if heads is None:
            positions, tokens = x.positions, x.input_ids
        else:
            positions, tokens = x.positions[heads], x.input_ids[heads]
            torch.index_select(b.hidden, 0, heads, out=b.lane_hidden[:n])
            b.row_positions[: self.rows].copy_(x.positions)
            b.row_slots[: x.padded].fill_(-1)
            self._reach = positions.to(torch.int32) + 1
        b.positions[:n].copy_(positions)
        b.tokens[:n].copy_(tokens)

    def _place_rows(self, step: int) -> None:
        """Of a mixed batch: where the rows of this pass write, and its heads to their rows."""
        b, x, n, heads = self.b, self.inputs, self.lanes, self.inputs.head_rows
        slots = b.slots
        if heads is not None:
            slots = b.row_slots
            slots[: self.rows].copy_(x.slots[step])
            b.hidden.index_copy_(0, heads, b.lane_hidden[:n])
            b.row_positions.index_copy_(0, heads, b.positions[:n])
            slots.index_copy_(0, heads, b.slots[:n])
        if x.row_stop is not None:
            # Rows past their last loop write nothing: their stand-ins are in place.
            slots[: self.rows].masked_fill_(x.row_stop <= step, -1)

    def _pass(self, step: int) -> None:
        if not self._mixed:
            self._play("block")
            return
        b, n, part = self.b, self.lanes, self.inputs.parts[step]
        decoding = b.decoding[:n]
        # A request that is being filled in is at loop `step` in all its rows, even when its head
        # has left already.
        view = RowView(
            self.rows,
            self.inputs.padded,
            b.row_positions[: self.inputs.padded],
            b.row_slots[: self.inputs.padded],
            b.loop[:n].masked_fill(~decoding, step),
            torch.where(decoding, b.seq_lens[:n], self._reach),
            part,
        )
        if part is None or len(part.rows):
            self.backend.run_rows(view)
        torch.index_select(b.hidden, 0, self.inputs.head_rows, out=b.lane_hidden[:n])
        pieces.gate(b, self.shape, b.lane_hidden, n)

    def _leave(self, step: int) -> None:
        """Stand-ins of the rows that leave after this pass, unless its cells wrote them."""
        b, x, n, stop = self.b, self.inputs, self.lanes, self.inputs.row_stop
        if self._mixed and x.candidates[step] is not None:
            loop = b.loop[:n]
            copies = (b.deepest[:n] - 1 - loop) * b.exit_mask[:n]
            self.backend.stand_in(b.slots[:n], b.positions[:n], loop, copies)
        if stop is not None and step + 1 < self.shape.loops:
            assert x.row_request is not None
            slots = b.row_slots[: self.rows] if self._mixed else b.slots[:n]
            copies = (b.deepest[x.row_request] - 1 - step) * (stop == step + 1)
            loop = torch.full_like(stop, step)
            self.backend.stand_in(slots, x.positions, loop, copies, x.row_request)

    def _read_out(self, step: int) -> None:
        lanes = self.inputs.candidates[step]
        if lanes is None:
            return
        if self.inputs.plain:
            self._play("read")
            return
        b, defer, drafts = self.b, self.inputs.defer, self.inputs.drafts
        if not drafts:
            pieces.remember(b, self.lanes)
        hidden, read = self._states[lanes], b.read_mask[lanes]
        if defer is not None:
            if self.deferred is None:
                self.deferred = hidden.new_zeros(self.lanes, hidden.shape[1])
            late = (read & defer[lanes])[:, None]
            self.deferred[lanes] = torch.where(late, hidden, self.deferred[lanes])
        logits = self.backend.logits(hidden, read)
        tokens = self.backend.sample(lanes, logits, step, b.positions[lanes])
        if drafts:
            self._settle(tokens)
            return
        place = pieces.take(b, lanes, read, tokens)
        now = read if defer is None else read & ~defer[lanes]
        self.backend.sampled(lanes, now, tokens, place)

    def _settle(self, tokens: torch.Tensor) -> None:
        """All lanes have been sampled, of a step with drafts."""
        b, defer, requests = self.b, self.inputs.defer, self.rows
        got, lane, place = (
            values[:requests] for values in draft_pieces.settle(b, self.shape, self.lanes, tokens)
        )
        now = got if defer is None else got & ~defer[:requests]
        self.backend.sampled(b.numbers[:requests], now, tokens[lane], place, lane)
