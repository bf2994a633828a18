"""Depths of a step on their way to the host: one copy, beside vLLM's own, read when it is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import AsyncModelRunnerOutput
from vllm.v1.worker.gpu.async_utils import async_copy_to_np, stream

from ouro_runtime.engine.step_output import StepOutput, pack_notes
from ouro_runtime.exit.cdf import exit_cdf
from ouro_runtime.reports import PARTS, StepReport


@dataclass
class StepBill:
    """What a step ran, as far as the host knows, and where the device wrote the rest.

    Attributes:
        req_ids: [R]. epochs: [R], which admission of each request this is.
        packed: what `StepRecord.packed` made.
        runs_all: [R] bool, the lane's positions run all T loops.
        decoding: [R] bool. rows: rows of a pass. loops: T.
    """

    req_ids: list[str]
    epochs: list[int]
    packed: torch.Tensor
    runs_all: np.ndarray
    decoding: np.ndarray
    rows: int
    loops: int

    def settle(self, packed: np.ndarray, count: np.ndarray) -> StepOutput:
        """The step's depths.

        Args:
            packed: the host's copy. count: [R], tokens of each request.
        """
        loops = self.loops
        depths, start, end = packed[:, :loops], packed[:, loops], packed[:, loops + 1]
        ran = np.where(self.runs_all[:, None], loops, depths)
        taken = np.arange(loops) < count[:, None]
        lanes = self.decoding
        cells = np.array(
            [
                (taken & (ran > loop))[lanes].sum()
                + (end > loop)[lanes].sum()
                - (start > loop)[lanes].sum()
                for loop in range(loops)
            ]
        )
        cells += self.rows - int(lanes.sum())
        history = packed[:, loops + 2 :].view(np.float32).reshape(-1, loops, loops)
        none = np.zeros_like(depths)
        cdf = exit_cdf(survival_at_exit(history, depths, start), depths)
        notes = pack_notes((depths, ran, none, none), cdf)
        amounts = count.tolist()
        return StepOutput(
            {r: notes[i, : amounts[i]] for i, r in enumerate(self.req_ids)},
            StepReport(
                pass_rows=[self.rows] * loops,
                rows_by_loop=cells.tolist(),
                tokens=sum(amounts),
                # Nothing is timed on the host: a pass is over there before it has run.
                seconds=dict.fromkeys(PARTS, 0.0),
            ),
        )


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
        inner: vLLM's `AsyncOutput`. note: told (bill, output) when the step has come back.
    """

    def __init__(
        self,
        inner: Any,
        bill: StepBill,
        note: Callable[[StepBill, StepOutput], None],
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
            self._note(self._bill, self._settled)
        output.ouro = self._settled
        return output
