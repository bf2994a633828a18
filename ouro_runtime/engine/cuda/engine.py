"""What runs a step's passes on CUDA: the `LaneBackend` of `gpu_step`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from vllm.distributed import get_tensor_model_parallel_world_size

from ouro_kernels import CacheTable, standin_fill
from ouro_runtime.engine.cuda.backend import LaneShape, RowView
from ouro_runtime.engine.cuda.block import BlockParts, lane_block, parts_of
from ouro_runtime.engine.cuda.graphs import PassGraphs
from ouro_runtime.engine.cuda.lanes import LaneBuffers
from ouro_runtime.engine.cuda.sampler import StepSampling
from ouro_runtime.engine.cuda.step import apply_gate

logger = logging.getLogger("vllm.ouro")

RunRows = Callable[[Any, LaneBuffers, RowView], None]


class LaneEngine:
    """The model, its caches and the sampler of the step at hand.

    Args:
        parts: the block over lanes; None: every batch goes through `run_rows`.
        table: all layers' caches. rows: `RowPasses.run`.
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


def make_engine(
    model: Any,
    buffers: LaneBuffers,
    loops: int,
    longest: int,
    rows: RunRows,
    graphs: PassGraphs,
) -> LaneEngine:
    """The engine of a loaded model whose caches are bound.

    Args:
        model: an `OuroLaneModel`. longest: positions of a request at most.
    """
    block = model.model
    attention, gate = block.layers[0].self_attn.attn, block.early_exit_gate
    shape = LaneShape(
        loops,
        attention.kv_cache.shape[2],
        gate.weight.data.flatten(),
        gate.bias.data.flatten(),
    )
    kind = attention.kv_cache_dtype
    fp8 = torch.float8_e4m3fn if kind in ("fp8", "fp8_e4m3") else None
    parts = parts_of(model, loops, longest, fp8)
    lanes = fp8 is not None or parts.layers[0].k_cache.dtype == buffers.hidden.dtype
    if not lanes:
        logger.warning(
            "Ouro Serve: no lane kernel reads a K/V cache of dtype %s; decode passes fall back to "
            "vLLM's attention, without graphs of whole passes",
            kind,
        )
    whole = get_tensor_model_parallel_world_size() == 1
    return LaneEngine(
        buffers,
        shape,
        parts if lanes else None,
        parts.cache_table(),
        rows,
        model.read_out,
        model.embed_input_ids,
        block.embed_tokens.weight.data if whole else None,
        graphs.replay,
    )
