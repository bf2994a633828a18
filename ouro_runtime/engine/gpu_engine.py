"""What runs a step's passes on CUDA: the `LaneBackend` of `gpu_step`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ouro_kernels import CacheTable, standin_fill
from ouro_runtime.engine.gpu_block import BlockParts, lane_block
from ouro_runtime.engine.gpu_lanes import LaneBuffers
from ouro_runtime.engine.gpu_sampler import StepSampling
from ouro_runtime.engine.gpu_step import LaneShape, RowView, apply_gate

RunRows = Callable[[Any, LaneBuffers, RowView], None]


class LaneEngine:
    """The model, its caches and the sampler of the step at hand.

    Args:
        parts: the block over lanes; None: every batch goes through `run_rows`.
        table: all layers' caches. rows: `RowPasses.run`, or what stands for it in a test.
        read_out: [M, H] -> [M, vocab]. embed: [M] -> [M, H].
        embedding: the table [V, H], if this process holds all of it; else None.
        replay: runs a captured pass of so many lanes, or says that there is none.
    """

    def __init__(
        self,
        buffers: LaneBuffers,
        shape: LaneShape,
        parts: BlockParts | None,
        table: CacheTable,
        rows: RunRows,
        read_out: Callable[[torch.Tensor], torch.Tensor],
        embed: Callable[[torch.Tensor], torch.Tensor],
        embedding: torch.Tensor | None,
        replay: Callable[[int], bool] = lambda lanes: False,
    ) -> None:
        self.buffers, self.shape, self.parts, self.table = buffers, shape, parts, table
        self.rows, self.read_out, self.embed = rows, read_out, embed
        self.weight, self.replay = embedding, replay
        self.batch: Any = None
        self.sampling: StepSampling | None = None
        self.candidates: list[np.ndarray] = []

    def begin(self, batch: Any, sampling: StepSampling, candidates: list[np.ndarray]) -> None:
        """A step over `batch` (vLLM's `InputBatch`) begins; `candidates`: see `LanePlan`."""
        self.batch, self.sampling, self.candidates = batch, sampling, candidates

    def pass_over_lanes(self, lanes: int, block_table: torch.Tensor) -> None:
        """What a graph holds: the block over `lanes` lanes, and the gate."""
        assert self.parts is not None
        lane_block(self.parts, self.buffers, lanes, block_table)
        apply_gate(self.buffers, self.shape, self.buffers.hidden[:lanes], lanes)

    # ---- LaneBackend ----------------------------------------------------------------------------

    def run_lanes(self, lanes: int, block_table: torch.Tensor) -> bool:
        if not self.replay(lanes):
            self.pass_over_lanes(lanes, block_table)
        return True

    def run_rows(self, view: RowView) -> None:
        self.rows(self.batch, self.buffers, view)

    def stand_in(self, slots: torch.Tensor, loop: torch.Tensor, mask: torch.Tensor) -> None:
        standin_fill(self.table, slots, loop, mask, self.shape.loops)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.read_out(hidden)

    def sample(
        self, lanes: torch.Tensor, logits: torch.Tensor, step: int, positions: torch.Tensor
    ) -> torch.Tensor:
        assert self.sampling is not None
        return self.sampling.sample(lanes, self.candidates[step], logits, positions)

    def sampled(
        self, lanes: torch.Tensor, read: torch.Tensor, tokens: torch.Tensor, place: torch.Tensor
    ) -> None:
        assert self.sampling is not None
        self.sampling.commit(lanes, read, tokens, place)

    def embedding(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.weight is not None:
            return self.weight, tokens
        # The vocabulary is spread over processes: embed here, and let row i be its own entry.
        return self.embed(tokens), self.buffers.numbers[: len(tokens)]
