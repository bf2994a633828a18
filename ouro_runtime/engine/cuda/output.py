"""Depths of a step on their way to the host: one copy, beside vLLM's own, read when it is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import AsyncModelRunnerOutput
from vllm.v1.worker.gpu.async_utils import async_copy_to_np, stream

from ouro_runtime.engine.step_output import COUNTS, StepOutput, pack_notes
from ouro_runtime.exit.cdf import exit_cdf
from ouro_runtime.reports import PARTS, StepReport


@dataclass
class StepBill:
    """What a step ran, as far as the host knows, and where the device wrote the rest.

    Attributes:
        req_ids: [R]. epochs: [R], which admission of each request this is.
        packed: what `StepRecord.packed` made.
        least: [R], loops that the lane's positions run, whatever their depth.
        decoding: [R] bool. rows: [T], rows of each pass. filled: [T], by loop, cells run of
            positions that are filled in. loops: T.
        drafted: [R] bool of a step with drafts, whose `packed` is `draft_pieces.packed`'s.
    """

    req_ids: list[str]
    epochs: list[int]
    packed: torch.Tensor
    least: np.ndarray
    decoding: np.ndarray
    rows: np.ndarray
    filled: np.ndarray
    loops: int
    drafted: np.ndarray | None = None
    _flights: np.ndarray | None = field(default=None, init=False)

    def settle(self, packed: np.ndarray, count: np.ndarray) -> StepOutput:
        """The step's depths.

        Args:
            packed: the host's copy. count: [R], tokens of each request.
        """
        loops, size = self.loops, self.loops + 2 + self.loops**2
        depths, start, end = packed[:, :loops], packed[:, loops], packed[:, loops + 1]
        ran = np.maximum(self.least[:, None], depths)
        history = packed[:, loops + 2 : size].view(np.float32).reshape(-1, loops, loops)
        if self.drafted is None:
            made = dropped = np.zeros_like(depths)
            cells = self._cells(ran, start, end, count)
            cdf = exit_cdf(survival_at_exit(history, depths, start), depths)
        else:
            made, dropped, waste, by_loop, self._flights = np.split(
                packed[:, size:], loops * np.arange(1, 5), axis=1
            )
            ran, cells = ran + waste, by_loop.sum(0)
            cdf = exit_cdf(history, np.where(self.drafted[:, None], loops, depths))
        notes = pack_notes((depths, ran, made, dropped), cdf)
        amounts = count.tolist()
        return StepOutput(
            {r: notes[i, : amounts[i]] for i, r in enumerate(self.req_ids)},
            StepReport(
                pass_rows=self.rows.tolist(),
                rows_by_loop=cells.tolist(),
                tokens=sum(amounts),
                # Nothing is timed on the host: a pass is over there before it has run.
                seconds=dict.fromkeys(PARTS, 0.0),
            ),
        )

    def _cells(
        self, ran: np.ndarray, start: np.ndarray, end: np.ndarray, count: np.ndarray
    ) -> np.ndarray:
        """Cells run at each loop, [T], by a step without drafts.

        Args:
            ran: [R, T], loops of each token. start, end: [R], see `StepRecord`. count: [R].
        """
        taken = np.arange(self.loops) < count[:, None]
        lanes = self.decoding
        cells = np.array(
            [
                (taken & (ran > loop))[lanes].sum()
                + (end > loop)[lanes].sum()
                - (start > loop)[lanes].sum()
                for loop in range(self.loops)
            ]
        )
        return cells + self.filled

    def flight(self, index: int) -> Flight | None:
        """What the request at `index` has in flight after a settled step that drafted it."""
        if self.drafted is None or self._flights is None or not self.drafted[index]:
            return None
        return Flight(*self._flights[index].tolist())


@dataclass
class Flight:
    """What a drafted request has in flight between two steps: a step that does not draft it drops
    all but the oldest position.

    Attributes:
        cells, drafts: loops run, and drafts made, of what would be dropped.
        drafted, draft: the loop at which the oldest position was drafted, 0 if it was not, and the
            token.
    """

    cells: int
    drafts: int
    drafted: int
    draft: int

    def settle(self, note: np.ndarray, token: int) -> None:
        """Write it into the `note` of the oldest position's `token`, which a step without drafts
        brought; see `COUNTS`."""
        depths, ran, made, dropped = range(len(COUNTS))
        note[ran] += self.cells
        note[dropped] += self.drafts
        note[made] = self.drafted
        if self.drafted and token == self.draft:
            note[depths] = self.drafted


def survival_at_exit(history: np.ndarray, depths: np.ndarray, start: np.ndarray) -> np.ndarray:
    """[R, T, T] float32: per lane and token, S(1)..S(depth) of the gate, then anything.

    Args:
        history: [R, T, T], depths: [R, T], start: [R]; see `StepRecord`.
    """
    # A lane never idles before its last token: token k left after the pass that ends its depth.
    passes = np.cumsum(depths, axis=1) - start[:, None] - 1
    lanes = np.arange(len(depths))[:, None]
    return history[lanes, passes.clip(0, depths.shape[1] - 1)]


class LaneOutput(AsyncModelRunnerOutput):
    """vLLM's asynchronous output with the step's depths in `ouro`.

    Args:
        inner: vLLM's `AsyncOutput`. note: told (bill, output, tokens by request) when the step has
            come back.
    """

    def __init__(
        self,
        inner: Any,
        bill: StepBill,
        note: Callable[[StepBill, StepOutput, list[list[int]]], None],
        main_stream: torch.cuda.Stream,
        copy_stream: torch.cuda.Stream,
    ) -> None:
        self._inner, self._bill, self._note = inner, bill, note
        self._settled: StepOutput | None = None
        # The device tensor stays referenced until its copy is done: it is made on another stream.
        self._event = torch.cuda.Event(blocking=True)
        with stream(copy_stream, main_stream):
            copy_stream.wait_stream(main_stream)
            self._packed = async_copy_to_np(bill.packed)
            self._event.record(copy_stream)

    def get_output(self) -> Any:
        """vLLM's output, once it is there. However often it is asked, depths are noted once."""
        output = self._inner.get_output()
        if self._settled is None:
            self._event.synchronize()
            count = np.array([len(tokens) for tokens in output.sampled_token_ids], np.int64)
            self._settled = self._bill.settle(self._packed, count)
            self._note(self._bill, self._settled, output.sampled_token_ids)
        output.ouro = self._settled
        return output
