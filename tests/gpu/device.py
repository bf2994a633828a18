"""A model of two tiny layers on the device side of the CUDA engine: steps as `OuroModelState` makes
them, without vLLM's runner, in plain torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams

from ouro_kernels import CacheTable
from ouro_runtime.config import ExitParams, LoopConfig
from ouro_runtime.engine.cuda import draft_pieces
from ouro_runtime.engine.cuda import engine as lane_engine
from ouro_runtime.engine.cuda.backend import LaneShape, StepInputs
from ouro_runtime.engine.cuda.block import BlockParts, LayerParts
from ouro_runtime.engine.cuda.engine import LaneEngine
from ouro_runtime.engine.cuda.lanes import LaneBuffers
from ouro_runtime.engine.cuda.output import StepBill
from ouro_runtime.engine.cuda.requests import LaneRequests
from ouro_runtime.engine.cuda.step import LaneStep

H, HEADS, SIZE, VOCAB, BLOCK = 16, 2, 8, 5, 4
LONGEST, SLOTS, LANES = 48, 6, 24
NEVER = -1


def draw(sampler: Any, b: LaneBuffers, logits: torch.Tensor) -> torch.Tensor:
    """In the place of `sample_plain`: the likeliest token, after noise of the seed and position."""
    lanes = len(logits)
    noise = torch.stack(
        [
            torch.rand(
                VOCAB, generator=torch.Generator().manual_seed(1009 * int(seed) + int(place))
            )
            for seed, place in zip(b.seed[:lanes], b.positions[:lanes], strict=True)
        ]
    )
    return (logits + b.temperature[:lanes, None] * noise).argmax(1)


DRAW = (lane_engine, "sample_plain", draw)
"""What a test patches: vLLM's sampler is written in Triton."""


@dataclass
class Request:
    """One request, and what came of it."""

    slot: int
    first: int
    token: int
    params: SamplingParams
    position: int = 0
    tokens: list[int] = field(default_factory=list)
    notes: list[list[int]] = field(default_factory=list)

    @property
    def over(self) -> bool:
        ended = self.tokens and self.tokens[-1] in (self.params.stop_token_ids or ())
        return bool(ended) or len(self.tokens) == self.params.max_tokens


class Device:
    """The lanes' engine over random weights.

    Args:
        loops: T. seed: of the weights. gate: its bias; high, and tokens leave early.
    """

    def __init__(self, loops: int, seed: int, gate: float = 0.0) -> None:
        rng = torch.Generator().manual_seed(seed)

        def weights(*size: int, scale: float = 0.5) -> torch.Tensor:
            return scale * torch.randn(*size, generator=rng)

        def cache() -> torch.Tensor:
            return torch.full((SLOTS * 12 * loops + 1, BLOCK, HEADS, SIZE), torch.nan)

        def layer() -> LayerParts:
            qkv, out = weights(3 * HEADS * SIZE, H), weights(H, HEADS * SIZE)
            up, down = weights(32, H), weights(H, 32)
            norms = [torch.ones(H) for _ in range(4)]
            return LayerParts(
                lambda x: x @ qkv.T,
                lambda x: x @ out.T,
                lambda x: torch.tanh(x @ up.T) @ down.T,
                *norms,
                cache(),
                cache(),
            )

        self.loops, self.table = loops, weights(VOCAB, H, scale=1.0)
        head = weights(VOCAB, H, scale=1.0)
        layers = [layer(), layer()]
        self.caches = [cache for x in layers for cache in (x.k_cache, x.v_cache)]
        angles = torch.arange(LONGEST)[:, None] / 10.0 ** torch.arange(SIZE // 2)
        cos_sin = torch.cat([angles.cos(), angles.sin()], 1)
        parts = BlockParts(layers, torch.ones(H), 1e-6, cos_sin, SIZE**-0.5, LONGEST)
        caches = CacheTable([x.k_cache for x in layers], [x.v_cache for x in layers])
        shape = LaneShape(loops, BLOCK, weights(H), torch.tensor([gate]))
        self.buffers = LaneBuffers(
            SLOTS, LANES, SLOTS, loops, H, torch.float32, "cpu", drafts=loops > 1
        )
        vocabulary: Any = SimpleNamespace(
            alone=True,
            logits=lambda hidden, read: hidden @ head.T,
            embedding=lambda tokens, numbers: (self.table, tokens),
        )
        # Pages by loop: of the batch, row by row; and by slot. Nobody has page 0.
        self.pages = torch.zeros(loops, SLOTS, 12, dtype=torch.int32)
        self.owned = 1 + torch.randperm(loops * SLOTS * 12, generator=rng).int()
        self.owned = self.owned.view(loops, SLOTS, 12)
        nothing: Any = None
        self.engine = LaneEngine(
            self.buffers,
            shape,
            parts,
            caches,
            self.pages,
            nothing,
            vocabulary,
            lambda *_: False,
            nothing,
        )
        config = LoopConfig(loops, ExitParams(1.0, 1, loops, "skip", guided=True))
        self.requests = LaneRequests(SLOTS, config, LONGEST)
        self.running: dict[str, Request] = {}
        self.cells = 0

    def add(self, name: str, slot: int, token: int, params: SamplingParams) -> Request:
        """A request whose prompt is one token, already known to be its head."""
        self.requests.add(slot, name, params, 1, 1)
        self.running[name] = Request(slot, token, token, params)
        return self.running[name]

    def step(self, names: Sequence[str], drafts: Mapping[str, int], pads: int = 0) -> None:
        """A decode step of the requests of these names.

        Args:
            drafts: who is to be drafted: see `DraftChoice.choose`. pads: lanes that only pad.
        """
        batch, b = [self.running[name] for name in names], self.buffers
        slots = np.array([request.slot for request in batch])
        yes = np.ones(len(batch), bool)
        plan = self.requests.book.plan(slots, yes, yes)
        columns = SimpleNamespace(temperature=self._column(batch, "temperature", np.float32))
        columns.seeds = self._column(batch, "seed", np.int64)
        params = self.requests.params(slots, yes, ~yes, plan, columns)
        rule = np.array([drafts.get(name, NEVER) for name in names])
        layout = self.requests.layout(slots, rule >= 0, rule)
        lanes = len(batch) if layout is None else len(layout)
        most = SLOTS if layout is None else LANES
        width, candidates = min(lanes + pads, most), plan.candidates
        bill = StepBill(
            list(names),
            self.requests.epochs(list(names)),
            torch.empty(0),
            np.where(params.run_all, params.deepest, 0),
            yes,
            np.full(self.loops, len(batch)),
            np.zeros(self.loops, np.int64),
            self.loops,
        )
        if layout is not None:
            assert b.drafts is not None
            candidates = [np.arange(lanes)] * self.loops
            params = layout.spread(params, self.requests.asks[slots], SLOTS)
            bill.drafted = layout.on[: len(batch)]
            b.drafts.packed(width).copy_(torch.from_numpy(layout.pack(width)))
        b.packed(width).copy_(torch.from_numpy(params.pack(width, SLOTS)))
        # Nobody has pages of loops that it cannot read; in `shared` all loops have the last one's.
        held = torch.arange(self.loops)[:, None] < torch.from_numpy(self.requests.deepest[slots])
        pages = self.owned[:, slots] * held[:, :, None]
        one = torch.from_numpy(self.requests.shared[slots])
        self.pages[:, : len(batch)] = torch.where(one[:, None], pages[-1], pages)
        positions = torch.tensor([request.position for request in batch])
        ids = torch.tensor([request.token for request in batch])
        inputs = StepInputs(
            lanes=lanes,
            head_rows=None,
            input_ids=ids,
            embedded=self.table[ids],
            positions=positions,
            slots=torch.zeros(self.loops, len(batch), dtype=torch.int64),
            candidates=[torch.from_numpy(c) if len(c) else None for c in candidates],
            padded=len(batch),
            plain=True,
            drafts=layout is not None,
        )
        step = LaneStep(b, self.engine.shape, inputs, self.engine, width)
        step.run()
        packed = step.record.packed() if layout is None else draft_pieces.packed(b, len(batch))
        self._bring(batch, bill, packed.numpy(), step.record)

    def _column(self, batch: Sequence[Request], name: str, kind: Any) -> Any:
        column = np.zeros(SLOTS, kind)
        for request in batch:
            column[request.slot] = getattr(request.params, name) or 0
        return SimpleNamespace(np=column)

    def _bring(self, batch: Any, bill: StepBill, packed: np.ndarray, record: Any) -> None:
        """What vLLM's runner and the host's bookkeeping do after a step."""
        count = record.count.numpy().copy()
        tokens = [record.tokens[i, :n].tolist() for i, n in enumerate(count)]
        output = bill.settle(packed, count)
        self.requests.land(bill, output, tokens)
        self.cells += sum(output.report.rows_by_loop)
        for request, brought, name in zip(batch, tokens, bill.req_ids, strict=True):
            request.tokens += brought
            request.notes += output.notes[name][:, :4].tolist()
            request.position += len(brought)
            request.token = brought[-1] if brought else request.token
