"""One engine step on CPU: what its passes need of vLLM, and what they bring.

The executor's `PassRunner`. Each of its parts is timed, so that the executor reads as what it does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np
import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.outputs import LogprobsTensors

from ouro_runtime.cache.pages import LoopPages
from ouro_runtime.cache.standin import StandIns
from ouro_runtime.engine.cpu.adapters import RowAdapters
from ouro_runtime.engine.cpu.sampler import StepSampler
from ouro_runtime.engine.guesses import likeliest
from ouro_runtime.engine.requests import LoopRequest
from ouro_runtime.engine.step_output import StepOutput, note_tokens
from ouro_runtime.loop.executor import StepExecutor, StepResult
from ouro_runtime.loop.planner import StepPlan
from ouro_runtime.loop.rows import HEAD, Left, Rows, Segments
from ouro_runtime.model.cpu_attention import Cells
from ouro_runtime.reports import PARTS, StepReport


class CPUStep:
    """A step of requests [R], in the batch's order.

    Args:
        model: the looped model (`cpu/model.py`). requests: what the worker remembers of each.
        sampler: samples between the passes. pages: the block tables of each loop.
        stand_ins: of all requests. metadata_builder: vLLM's, of the attention backend.
        adapters: None without LoRA. adapter_ids: of the requests, [R] int64, 0 for none.
    """

    result: StepResult
    _cells: Cells

    def __init__(
        self,
        model: Any,
        requests: list[LoopRequest],
        sampler: StepSampler,
        pages: LoopPages,
        stand_ins: StandIns,
        metadata_builder: Any,
        adapters: RowAdapters | None,
        adapter_ids: np.ndarray,
    ) -> None:
        self.model, self.requests, self.sampler = model, requests, sampler
        self.pages, self.stand_ins, self.metadata_builder = pages, stand_ins, metadata_builder
        self.adapters, self.adapter_ids = adapters, adapter_ids
        self.shared = np.array([request.shared for request in requests], bool)
        self.prompts = np.array([request.prompt for request in requests], np.int64)
        self.slots = np.array([request.slot for request in requests], np.int64)
        self.asked = np.array([request.guesses is not None for request in requests], bool)
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def run(
        self, executor: StepExecutor, plan: StepPlan, embedded: torch.Tensor, keep_hidden: bool
    ) -> StepResult:
        """Run the passes; requests remember their depths and what is carried over."""
        began = perf_counter()
        self.result = executor.run(plan, embedded, self, keep_hidden)
        self.guided = bool(plan.guided.any())
        self.seconds["plan"] = perf_counter() - began - sum(self.seconds.values())
        self.notes = note_tokens(self.result.readouts, len(self.requests), executor.loops)
        for index, (request, carried) in enumerate(
            zip(self.requests, self.result.carried, strict=True)
        ):
            noted = self.notes[index]
            if request.guesses is not None and len(noted):
                first = request.prompt + len(request.depths) - 1
                self.notes[index] = request.guesses.take(first, noted)
            request.depths += noted[:, 0].tolist()
            request.carried = carried
        return self.result

    def deferred_logits(self, vocab: int) -> torch.Tensor:
        """Logits [R, vocab] with rows for the deferred requests; [0, vocab] if there are none."""
        deferred = self.result.deferred
        if not deferred:
            return torch.empty(0, vocab)
        rows = self.model.read_out(torch.stack(list(deferred.values())))
        logits = rows.new_zeros(len(self.requests), vocab)
        logits[torch.tensor(list(deferred))] = rows
        return logits

    def finish(self, logits: torch.Tensor) -> tuple[torch.Tensor, LogprobsTensors | None]:
        """Sample the deferred requests from `logits` [R, vocab], then hand over all tokens of the
        step, see `StepSampler.finish`."""
        deferred = np.array(sorted(self.result.deferred), np.int64)
        if len(deferred):
            self.sampler.sample(deferred, logits[torch.from_numpy(deferred)])
        return self.sampler.finish()

    def output(self, req_ids: Sequence[str], tokens: list[list[int]]) -> StepOutput:
        """For the scheduler: depths by request, and what the passes did."""
        report = StepReport(
            pass_rows=self.result.pass_rows,
            rows_by_loop=self.result.rows_by_loop.tolist(),
            tokens=sum(map(len, tokens)),
            seconds=self.seconds,
        )
        return StepOutput(dict(zip(req_ids, self.notes, strict=True)), report, self.guided)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        began = perf_counter()
        yield
        self.seconds[part] += perf_counter() - began

    # ---- ouro_runtime.loop.executor.PassRunner ------------------------------------------------

    def prepare(self, rows: Rows, segments: Segments) -> None:
        with self._timed("metadata"):
            if self.adapters is not None:
                self.adapters.place(self.adapter_ids[rows.req])
            planes, of_segment = rows.loop, segments.loop
            if self.shared.any():
                shared, prompts = self.shared[rows.req], self.prompts[rows.req]
                planes = self.pages.planes(shared, prompts, rows.pos, rows.loop)
                of_segment = planes[segments.first[:-1]]
            slots = torch.from_numpy(self.pages.slots(rows.req, rows.pos, planes))
            longest = int(segments.seq_len.max())
            first = torch.from_numpy(segments.first)
            metadata = self.metadata_builder.build(
                0,
                CommonAttentionMetadata(
                    query_start_loc=first,
                    query_start_loc_cpu=first,
                    seq_lens=torch.from_numpy(segments.seq_len),
                    num_reqs=len(segments.req),
                    num_actual_tokens=len(rows),
                    max_query_len=segments.max_query,
                    max_seq_len=longest,
                    block_table_tensor=torch.from_numpy(
                        self.pages.tables(segments.req, of_segment, longest)
                    ),
                    slot_mapping=slots,
                    causal=True,
                ),
            )
            debts = self.stand_ins.due(
                self.slots[segments.req],
                segments.loop,
                segments.seq_len.astype(np.int64) - 1,
                self.pages.by_loop,
                segments.req,
            )
            self._cells = get_forward_context().attn_metadata = Cells(metadata, debts)

    def run_pass(self, hidden: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        with self._timed("block"):
            hidden, halt = self.model.model(hidden, torch.from_numpy(rows.pos))
            if self.adapters is not None:
                self.adapters.halt(hidden, halt)
        self.seconds["block"] -= self._cells.seconds
        self.seconds["stand_in"] += self._cells.seconds
        if self.asked.any():
            self._hear(hidden, rows)
        return hidden, halt

    def _hear(self, hidden: torch.Tensor, rows: Rows) -> None:
        """Keep what this pass would say of tokens that are not known yet, for who asked."""
        places = np.nonzero(self.asked[rows.req] & (rows.stop >= HEAD))[0]
        if not len(places):
            return
        logits = self.read_out(hidden.index_select(0, torch.from_numpy(places)))
        asking = [self.requests[req].guesses for req in rows.req[places].tolist()]
        top = likeliest(logits, max(guesses.most for guesses in asking if guesses is not None))
        where = zip(asking, rows.pos[places].tolist(), rows.loop[places].tolist(), strict=True)
        for (guesses, position, loop), ids, logprobs in zip(where, *top, strict=True):
            assert guesses is not None
            guesses.hear(position, loop, ids, logprobs)

    def embed(self, tokens: np.ndarray) -> torch.Tensor:
        ids, table = torch.from_numpy(tokens), self.model.model.embed_tokens
        if table.tp_size == 1 and type(table.quant_method) is UnquantizedEmbeddingMethod:
            return torch.nn.functional.embedding(ids, table.weight)
        return self.model.embed_input_ids(ids)

    def read_out(self, hidden: torch.Tensor) -> torch.Tensor:
        with self._timed("read_out"):
            return self.model.read_out(hidden)

    def sample(self, req: np.ndarray, logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        with self._timed("read_out"):
            tokens = self.sampler.sample(req, logits)
            return tokens, self._stops(req, tokens)

    def draft(self, req: np.ndarray, logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        with self._timed("read_out"):
            tokens = self.sampler.draft(req, logits)
            return tokens, self._stops(req, tokens)

    def _stops(self, req: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """[M] bool, whether a request ends with its token."""
        pairs = zip(req.tolist(), tokens.tolist(), strict=True)
        return np.array([token in self.requests[index].stops for index, token in pairs], bool)

    def stand_in(self, left: Left) -> None:
        owes = ~self.shared[left.req]
        self.stand_ins.owe(self.slots[left.req[owes]], left.pos[owes], left.depth[owes])
