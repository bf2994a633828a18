"""What runs a step's passes on CUDA: the `LaneBackend` of `cuda/step.py`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from ouro_kernels import CacheTable, read_out, standin_fill
from ouro_runtime.engine.cuda import draft_pieces, pieces
from ouro_runtime.engine.cuda.backend import LaneShape, RowView
from ouro_runtime.engine.cuda.block import BlockParts, lane_block, parts_of
from ouro_runtime.engine.cuda.graphs import StepGraphs
from ouro_runtime.engine.cuda.lanes import LaneBuffers
from ouro_runtime.engine.cuda.sampler import StepSampling, sample_plain

logger = logging.getLogger("vllm.ouro")

RunRows = Callable[[Any, LaneBuffers, RowView], None]


class LaneEngine:
    """The model, its caches and the sampler of the step at hand.

    Args:
        parts: the block over lanes; None: every batch goes through `run_rows`.
        table: all layers' caches. block_table: [T, max requests, B] int32, by loop, the page of
            each request's n-th block; not copied. rows: `RowPasses.run`.
        vocabulary: the model's embeddings.
        replay: runs a captured piece over so many lanes, or says that there is none.
        sampler: vLLM's.
    """

    def __init__(
        self,
        buffers: LaneBuffers,
        shape: LaneShape,
        parts: BlockParts | None,
        table: CacheTable,
        block_table: torch.Tensor,
        rows: RunRows,
        vocabulary: Vocabulary,
        replay: Callable[[str, int], bool],
        sampler: Any,
    ) -> None:
        self.buffers, self.shape, self.parts, self.table = buffers, shape, parts, table
        self.block_table, self.rows, self.vocabulary = block_table, rows, vocabulary
        self.replay, self.sampler = replay, sampler
        self.batch: Any = None
        self.sampling: StepSampling | None = None
        self.candidates: list[np.ndarray] = []
        # In the order of a step. Each takes the lanes' states and how many lanes there are.
        self._pieces: dict[str, Callable[[torch.Tensor, int], None]] = {
            "begin": partial(pieces.begin, buffers, shape, block_table=block_table),
            "block": self._block,
            "read": self._read,
            "advance": self._advance,
            "carry": partial(pieces.carry, buffers),
        }
        if buffers.drafts is not None:
            self._pieces |= {
                "draft_begin": partial(draft_pieces.begin, buffers, shape, block_table=block_table),
                "draft_block": self._draft_block,
                "draft_read": self._draft_read,
                "draft_advance": self._draft_advance,
                "draft_carry": partial(draft_pieces.carry, buffers, shape),
            }

    def begin(self, batch: Any, sampling: StepSampling, candidates: list[np.ndarray]) -> None:
        """A step over `batch` (vLLM's `InputBatch`) begins; `candidates`: see `LanePlan`."""
        self.batch, self.sampling, self.candidates = batch, sampling, candidates

    def capturable(self, drafts: bool = False) -> dict[str, Callable[[int], None]]:
        """The pieces that a graph may hold, in the order of a step: all that it plays, but those
        that talk to other processes.

        Args:
            drafts: those of a step with drafts.
        """
        left_out = set() if self.vocabulary.alone else {"read", "advance"}
        if self.shape.loops == 1:
            left_out.add("advance")
        return {
            name: partial(run, self.buffers.hidden)
            for name, run in self._pieces.items()
            if name.startswith("draft_") == drafts and name.removeprefix("draft_") not in left_out
        }

    def _block(self, states: torch.Tensor, lanes: int) -> None:
        assert self.parts is not None
        lane_block(self.parts, self.buffers, lanes, self.block_table)
        pieces.gate(self.buffers, self.shape, states, lanes)

    def _read(self, states: torch.Tensor, lanes: int) -> None:
        b = self.buffers
        pieces.remember(b, lanes)
        read = b.read_mask[:lanes]
        logits = self.vocabulary.logits(states[:lanes], read)
        pieces.take(b, b.numbers[:lanes], read, sample_plain(self.sampler, b, logits))

    def _advance(self, states: torch.Tensor, lanes: int) -> None:
        b = self.buffers
        embedding = self.vocabulary.embedding(b.tokens[:lanes], b.numbers[:lanes])
        pieces.advance(b, self.shape, states, lanes, embedding, self.block_table)

    # Of a step with drafts: a lane's row of the block table is its request's.

    def _draft_block(self, states: torch.Tensor, lanes: int) -> None:
        assert self.parts is not None
        rows = draft_pieces.of(self.buffers).row[:lanes]
        lane_block(self.parts, self.buffers, lanes, self.block_table, rows)
        pieces.gate(self.buffers, self.shape, states, lanes)
        draft_pieces.choose(self.buffers, self.shape, lanes)

    def _draft_read(self, states: torch.Tensor, lanes: int) -> None:
        b = self.buffers
        logits = self.vocabulary.logits(states[:lanes], b.read_mask[:lanes])
        draft_pieces.settle(b, self.shape, lanes, sample_plain(self.sampler, b, logits))

    def _draft_advance(self, states: torch.Tensor, lanes: int) -> None:
        b = self.buffers
        embedding = self.vocabulary.embedding(b.tokens[:lanes], b.numbers[:lanes])
        rows = draft_pieces.of(b).row[:lanes]
        pieces.advance(b, self.shape, states, lanes, embedding, self.block_table, rows)

    # ---- LaneBackend ----------------------------------------------------------------------------

    def play(self, piece: str, lanes: int, mixed: bool) -> None:
        if mixed:
            self._pieces[piece](self.buffers.lane_hidden, lanes)
        elif not self.replay(piece, lanes):
            self._pieces[piece](self.buffers.hidden, lanes)

    def run_rows(self, view: RowView) -> None:
        self.rows(self.batch, self.buffers, view)

    def stand_in(
        self,
        slots: torch.Tensor,
        positions: torch.Tensor,
        loop: torch.Tensor,
        copies: torch.Tensor,
        requests: torch.Tensor | None = None,
    ) -> None:
        standin_fill(self.table, self.block_table, slots, positions, loop, copies, requests)

    def logits(self, hidden: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        return self.vocabulary.logits(hidden, read)

    def sample(
        self, lanes: torch.Tensor, logits: torch.Tensor, step: int, positions: torch.Tensor
    ) -> torch.Tensor:
        assert self.sampling is not None
        return self.sampling.sample(lanes, self.candidates[step], logits, positions)

    def sampled(
        self,
        requests: torch.Tensor,
        read: torch.Tensor,
        tokens: torch.Tensor,
        place: torch.Tensor,
        sampled: torch.Tensor | None = None,
    ) -> None:
        assert self.sampling is not None
        self.sampling.commit(requests, read, tokens, place, sampled)


class Vocabulary:
    """A model's way from tokens to states and back.

    Attributes:
        alone: this process holds all of it.
    """

    def __init__(self, model: Any) -> None:
        self._model, head = model, model.lm_head
        self.alone = get_tensor_model_parallel_world_size() == 1
        self._table = model.model.embed_tokens.weight.data if self.alone else None
        # Where the model's read-out is a product in its own dtype, and nothing else, ours serves.
        plain = self.alone and isinstance(head.quant_method, UnquantizedEmbeddingMethod)
        plain = plain and model.logits_processor.head_dtype in (None, head.weight.dtype)
        self._weight = head.weight.data[: model.config.vocab_size] if plain else None

    def logits(self, hidden: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """[M, vocab] of states [M, H]; rows that are not `read` [M] mean nothing."""
        if self._weight is None:
            return self._model.read_out(hidden)
        return read_out(hidden, self._weight, read)

    def embedding(
        self, tokens: torch.Tensor, numbers: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A table [V, H] and the rows of it [M] that embed `tokens` [M]; `numbers`: 0 to M - 1."""
        if self._table is not None:
            return self._table, tokens
        # The vocabulary is spread over processes: embed here, and let row i be its own entry.
        return self._model.embed_input_ids(tokens), numbers


def make_engine(
    model: Any,
    buffers: LaneBuffers,
    loops: int,
    longest: int,
    block_table: torch.Tensor,
    rows: RunRows,
    graphs: StepGraphs,
    sampler: Any,
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
    parts = parts_of(model, longest, fp8)
    lanes = fp8 is not None or parts.layers[0].k_cache.dtype == buffers.hidden.dtype
    if not lanes:
        logger.warning(
            "Ouro Serve: no lane kernel reads a K/V cache of dtype %s; decode passes fall back to "
            "vLLM's attention, without graphs of whole passes",
            kind,
        )
    return LaneEngine(
        buffers,
        shape,
        parts if lanes else None,
        parts.cache_table(),
        block_table,
        rows,
        Vocabulary(model),
        graphs.replay,
        sampler,
    )
