"""Seam: the `ModelState` of vLLM's V2 runner, through which a step's passes run on CUDA.

The runner prepares a batch, calls `prepare_attn`, `prepare_inputs` and the model's `forward`, then
the sampler. `prepare_inputs` hands `forward` a `LaneStep`; `forward` runs it; the sampler's place
is taken by one that hands over what the passes sampled. A batch of unknown requests (profiling,
warm-up, capture) runs the model once, as vLLM does.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu.model_states.interface import ModelState

from ouro_runtime.config import LoopConfig
from ouro_runtime.engine.cuda import draft_pieces, tables
from ouro_runtime.engine.cuda.backend import StepInputs
from ouro_runtime.engine.cuda.buckets import draft_lanes, pass_buckets
from ouro_runtime.engine.cuda.draft_layout import DraftLayout
from ouro_runtime.engine.cuda.engine import LaneEngine, make_engine
from ouro_runtime.engine.cuda.graphs import StepGraphs
from ouro_runtime.engine.cuda.lanes import LaneBuffers
from ouro_runtime.engine.cuda.output import StepBill
from ouro_runtime.engine.cuda.requests import LaneRequests
from ouro_runtime.engine.cuda.rows import RowPasses, parts
from ouro_runtime.engine.cuda.sampler import LaneSampler, StepSampling, remembers
from ouro_runtime.engine.cuda.step import LaneStep

logger = logging.getLogger("vllm.ouro")


class OuroModelState(ModelState):
    """Steps of a looped model on vLLM's V2 runner."""

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: Any) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.loops = LoopConfig.of(vllm_config).loops
        config, loop_config = self.model_config.hf_config, LoopConfig.of(vllm_config)
        self.requests = LaneRequests(self.max_num_reqs, loop_config, self.max_model_len)
        most = draft_lanes((), self.max_num_reqs, self.loops, loop_config.drafts)
        self.buffers = LaneBuffers(
            self.max_num_tokens,
            max(self.max_num_reqs, most),
            self.max_num_reqs,
            self.loops,
            config.hidden_size,
            self.dtype,
            device,
            drafts=most > 0,
        )
        # Of the step to come, as the scheduler says: who is drafted, and where (`DraftChoice`).
        self.drafts: dict[str, int] = {}
        self.graphs = StepGraphs(device)
        self.engine: LaneEngine | None = None
        self.rows: RowPasses | None = None
        self.sampler: Any = None
        self._tables: torch.Tensor | None = None
        self._slots: torch.Tensor | None = None
        self._step: LaneStep | None = None
        self._bill: StepBill | None = None
        model.lane_state = self

    # ---- set-up ---------------------------------------------------------------------------------

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any] | None:
        self.sampler = sampler
        return LaneSampler(sampler, self), None

    def get_additional_cg_support(self) -> tuple[AttentionCGSupport, str | None]:
        # In full-graph mode the runner replays a graph of its own and never calls `forward`.
        return AttentionCGSupport.NEVER, "Ouro (its passes have graphs of their own)"

    def initialize_kv_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
        """The caches are bound (anew: after profiling, everything captured is void)."""
        self.release()
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        assert [spec.loop for spec in specs] == list(range(self.loops)), specs
        for layer in self.model.model.layers:
            layer.self_attn.attn.check_pages()
            page = layer.self_attn.attn.kv_cache.shape[2]
            assert page == specs[0].block_size, "kernel blocks differ from logical blocks"
        self._tables = tables.join(block_tables)
        self.engine = make_engine(
            self.model,
            self.buffers,
            self.loops,
            self.max_model_len,
            self._tables,
            self._run_rows,
            self.graphs,
            self.sampler,
        )

    def release(self) -> None:
        """Let go of everything that holds on to the caches and to the graphs' memory."""
        self.graphs.release()
        self.engine = self.rows = self._tables = self._slots = None

    def capture_inner_cudagraphs(
        self, input_buffers: Any, block_tables: Any, attn_groups: Any, kv_cache_config: Any
    ) -> None:
        engine = self.engine
        assert engine is not None
        if engine.parts is None:
            return
        sizes = self.vllm_config.compilation_config.cudagraph_capture_sizes or ()
        # What an earlier step left means other things at another width; zeros let nobody run.
        self.buffers.params.zero_()
        most = draft_lanes(sizes, self.max_num_reqs, self.loops, self.buffers.drafts is not None)
        drafting = pass_buckets(sizes, most) if most else ()
        if self.buffers.drafts is not None:
            self.buffers.drafts.params.zero_()
        self.graphs.capture(
            pass_buckets(sizes, self.max_num_reqs),
            engine.capturable(),
            [lanes for lanes in drafting if lanes >= self.loops],
            engine.capturable(drafts=True),
        )
        logger.info("Ouro Serve: captured passes of %s lanes", list(self.graphs.buckets))

    # ---- requests -------------------------------------------------------------------------------

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        self.requests.add(
            req_index,
            new_req_data.req_id,
            new_req_data.sampling_params,
            new_req_data.prompt_len,
            len(new_req_data.prefill_token_ids),
        )

    def remove_request(self, req_id: str) -> None:
        self.requests.leave(req_id)

    # ---- a step ---------------------------------------------------------------------------------

    def _real(self, batch: Any) -> bool:
        return batch.req_ids[0] in self.requests

    def prepare_attn(
        self,
        input_batch: Any,
        cudagraph_mode: Any,
        block_tables: Any,
        slot_mappings: torch.Tensor,
        attn_groups: Any,
        kv_cache_config: Any,
        for_capture: bool = False,
        ubatch_idx: int = 0,
    ) -> dict[str, Any]:
        if self.rows is None:
            assert self._tables is not None
            self.rows = RowPasses(
                self.model.model,
                self.loops,
                self._tables,
                attn_groups,
                kv_cache_config,
                self.max_model_len,
            )
        self._slots = slot_mappings
        if self._real(input_batch):
            return {}  # every pass builds its own
        loop = torch.zeros(input_batch.num_reqs, dtype=torch.int32, device=self.device)
        return self.rows.metadata(
            input_batch,
            loop,
            input_batch.seq_lens[: input_batch.num_reqs],
            input_batch.positions,
            slot_mappings[0],
            for_capture,
        )

    def _run_rows(self, batch: Any, buffers: LaneBuffers, view: Any) -> None:
        assert self.rows is not None
        self.rows.run(batch, buffers, view)

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        if not self._real(input_batch):
            return {}
        self._step = self._prepare_step(input_batch)
        return {"lane_step": self._step}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        return {}

    def prepare_inputs_embeds(self, *args: Any, **kwargs: Any) -> None:
        return None

    def _prepare_step(self, batch: Any) -> LaneStep:
        engine, requests, buffers = self.engine, self.requests, self.buffers
        assert engine is not None and self._tables is not None and self._slots is not None
        slots = batch.idx_mapping_np
        count, known = batch.num_scheduled_tokens, batch.prefill_len_np
        start = batch.num_computed_prefill_tokens_np
        decoding = ~batch.is_prefilling_np
        heads = decoding | (start + count >= known)
        resumed = heads & ~decoding & (known > requests.prompt[slots])
        plan = requests.book.plan(slots, decoding, heads)
        params = requests.params(slots, decoding, resumed, plan, self.sampler.sampling_states)
        stops = requests.row_stops(batch.req_ids, slots, start, count, known, decoding)
        late = requests.book.single[slots] & heads
        self._late = np.nonzero(late)[0]
        shared = requests.shared[slots] & (decoding | (start >= requests.prompt[slots]))
        if shared.any():
            of_rows = np.nonzero(np.repeat(shared, count))[0]
            chosen = self._to_device(np.nonzero(shared)[0]), self._to_device(of_rows)
            tables.share(self._tables, self._slots, *chosen)
        requested, rows = batch.num_reqs, batch.num_tokens
        mixed = rows != requested or engine.parts is None
        layout = self._layout(batch, mixed or not decoding.all())
        lanes = requested if layout is None else len(layout)
        width = lanes if mixed else self.graphs.width(lanes, layout is not None)
        spare = self.max_num_reqs
        candidates = plan.candidates
        # A prompt's rows run the loops that its request can read.
        runs = decoding | (params.deepest > np.arange(self.loops)[:, None])
        self._bill = StepBill(
            list(batch.req_ids),
            requests.epochs(batch.req_ids),
            torch.empty(0),
            np.where(params.run_all, params.deepest, 0),
            decoding,
            (runs * count).sum(1) if mixed else np.full(self.loops, lanes),
            (runs * count * ~decoding).sum(1),
            self.loops,
        )
        if layout is not None:
            assert buffers.drafts is not None
            candidates = [np.arange(lanes)] * self.loops
            params = layout.spread(params, requests.asks[slots], spare)
            late = late[layout.row] & (layout.place == 0)
            self._bill.drafted = layout.on[:requested]
            async_tensor_h2d(layout.pack(width), out=buffers.drafts.packed(width))
        async_tensor_h2d(params.pack(width, spare), out=buffers.packed(width))
        rows_of = None if layout is None else layout.row
        sampling = StepSampling(self.sampler, batch, self.loops, buffers.tokens, rows_of)
        engine.begin(batch, sampling, candidates)
        ids = batch.input_ids[:rows]
        inputs = StepInputs(
            lanes=lanes,
            head_rows=batch.logits_indices if mixed else None,
            input_ids=ids,
            embedded=self.model.embed_input_ids(ids),
            positions=batch.positions[:rows],
            slots=self._slots[:, :rows],
            candidates=[self._lanes(lanes, chosen) for chosen in candidates],
            padded=batch.num_tokens_after_padding,
            plain=sampling.plain and not mixed and not len(self._late) and bool(heads.all()),
            parts=parts(batch, runs, self.device) if mixed else (),
            row_stop=None if stops is None else self._to_device(stops),
            row_request=self._rows_of(count) if stops is not None else None,
            defer=self._to_device(late) if len(self._late) else None,
            drafts=layout is not None,
        )
        return LaneStep(buffers, engine.shape, inputs, engine, width)

    def _layout(self, batch: Any, held: bool) -> DraftLayout | None:
        """The lanes of a step over `batch` with drafts, None for one without.

        Args:
            held: nobody is drafted in a step of its kind. What is in flight is dropped then, but
                for each request's oldest position, which goes on.
        """
        slots = batch.idx_mapping_np
        if held or not self.drafts:
            self.requests.flying[slots] = False
            return None
        rule = np.array([self.drafts.get(req_id, -1) for req_id in batch.req_ids])
        wanted = rule >= 0
        for place in np.nonzero(wanted)[0]:
            wanted[place] = not remembers(self.sampler, slots[[place]])
        return self.requests.layout(slots, wanted, rule)

    def _rows_of(self, count: np.ndarray) -> torch.Tensor:
        """[N] int32, the request of each row, of `count` [R] rows."""
        return self._to_device(np.repeat(np.arange(len(count), dtype=np.int32), count))

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return async_tensor_h2d(array, device=self.device)

    def _lanes(self, lanes: int, chosen: np.ndarray) -> torch.Tensor | None:
        if not len(chosen):
            return None
        return self.buffers.numbers[:lanes] if len(chosen) == lanes else self._to_device(chosen)

    # ---- after the passes -----------------------------------------------------------------------

    @property
    def stepping(self) -> bool:
        """Whether a step has run and its sampler output was not fetched yet."""
        return self._step is not None

    def late_logits(self) -> torch.Tensor:
        """Logits [R, vocab] with rows for the lanes sampled after the step; [0, vocab] if none."""
        step = self._step
        assert step is not None
        vocab = self.model_config.get_vocab_size()
        if not len(self._late):
            return torch.empty(0, vocab, dtype=self.dtype, device=self.device)
        assert step.deferred is not None
        return self.model.read_out(step.deferred)

    def step_done(self, logits: torch.Tensor) -> tuple[Any, bool] | None:
        """The sampler output of the step that ran, and whether its tokens are counted already."""
        step, self._step = self._step, None
        if step is None:
            return None
        engine, record = self.engine, step.record
        assert engine is not None and engine.sampling is not None and self._bill is not None
        sampling, batch = engine.sampling, engine.batch
        if len(self._late):
            lanes = self._to_device(self._late)
            positions = batch.positions[batch.logits_indices[lanes]]
            tokens = sampling.sample(lanes, self._late, logits[lanes], positions)
            record.tokens[lanes, 0] = tokens
            sampling.commit(lanes, record.count[lanes] > 0, tokens, lanes * self.loops)
        if self._bill.drafted is None:
            self._bill.packed = record.packed()
        else:
            self._bill.packed = draft_pieces.packed(self.buffers, batch.num_reqs)
        return sampling.output(record), sampling.counted

    def take_bill(self) -> StepBill | None:
        """The bill of the step whose output was just made."""
        bill, self._bill = self._bill, None
        return bill

    def note(self, bill: StepBill, output: Any, tokens: list[list[int]]) -> None:
        """A step's depths are on the host, and its `tokens` by request."""
        self.requests.land(bill, output, tokens)
        for req_id, epoch in zip(bill.req_ids, bill.epochs, strict=True):
            self.requests.note(req_id, epoch, output.depths(req_id))
