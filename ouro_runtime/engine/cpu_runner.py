"""Seam: vLLM's V1 CPU model runner, whose forward becomes the passes of a step.

What is overridden, and why:
- `_model_forward` runs the step's passes (vLLM runs the model once);
- `_build_attention_metadata` is skipped, since every pass builds its own;
- `_sample` hands over the tokens that the passes sampled, and samples the requests that need the
  host first (grammars);
- `sample_tokens` adds the step's depths to the output.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm import _custom_ops as ops
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.outputs import SamplerOutput
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from ouro_runtime.cache.pages import LoopPages
from ouro_runtime.cache.standin import StandIns
from ouro_runtime.config import LoopConfig, StepReport
from ouro_runtime.engine.pin import check_parameters
from ouro_runtime.engine.requests import LoopRequest
from ouro_runtime.engine.row_sampler import StepSampler
from ouro_runtime.engine.row_state import drop_ended_budgets
from ouro_runtime.engine.step_output import StepOutput, note_tokens
from ouro_runtime.exit.policy import POLICIES
from ouro_runtime.loop.executor import StepExecutor, StepResult
from ouro_runtime.loop.planner import StepPlan
from ouro_runtime.loop.rows import Left, Rows, Segments
from ouro_runtime.model.cpu_attention import Cells

# What model/cpu_attention.py calls.
check_parameters(ops.cpu_attn_reshape_and_cache, "key_cache", "slot_mapping", "isa")
check_parameters(ops.cpu_attention_with_kv_cache, "query_start_loc", "scheduler_metadata", "s_aux")
check_parameters(CPUModelRunner._model_forward, "input_ids", "positions")
check_parameters(CPUModelRunner._sample, "logits", "spec_decode_metadata")
check_parameters(CPUModelRunner._build_attention_metadata, "num_tokens", "num_reqs")
check_parameters(CPUModelRunner._on_request_state_removed, "req_id", "req_state")


class OuroCPUModelRunner(CPUModelRunner):
    """Runs looped models on CPU. It is itself the executor's `PassRunner` during a step."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.loop_config = LoopConfig.of(vllm_config)
        self.executor = StepExecutor(self.loop_config.loops, POLICIES["gate"])
        self.loop_requests: dict[str, LoopRequest] = {}

    # ---- set-up -------------------------------------------------------------------------------

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        (self._group,) = self.kv_cache_config.kv_cache_groups
        (attention,) = self.attn_groups[0]
        assert attention.backend is CPUAttentionBackend, attention.backend
        self._metadata_builder = attention.get_metadata_builder()
        self._block_size = self._group.kv_cache_spec.block_size
        table = self.input_batch.block_table[0]
        assert table.block_size == self._block_size, "kernel blocks differ from logical blocks"
        self._stand_ins = StandIns(self.loop_config.loops, self.max_model_len, self._block_size)

    # ---- requests -----------------------------------------------------------------------------

    def _on_request_state_removed(self, req_id: str, req_state: Any) -> None:
        request = self.loop_requests.pop(req_id, None)
        if request is not None:
            self._stand_ins.close(request.slot)
        super()._on_request_state_removed(req_id, req_state)

    def _loop_request(self, req_id: str) -> LoopRequest:
        request = self.loop_requests.get(req_id)
        if request is None:
            state = self.requests[req_id]
            request = LoopRequest.of(
                state.sampling_params, state.num_prompt_tokens, self.loop_config
            )
            request.slot = self._stand_ins.open(request.prompt)
            self.loop_requests[req_id] = request
        return request

    # ---- a step -------------------------------------------------------------------------------

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> Any:
        # A request that was preempted is computed again, but for what the prefix cache still has:
        # what it had in flight is void.
        cached = scheduler_output.scheduled_cached_reqs
        for req_id, hit in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            request = self.loop_requests.get(req_id)
            if request is not None and req_id in cached.resumed_req_ids:
                request.carried = []
                self._stand_ins.rewind(request.slot, max(request.prompt, hit))
        self._scheduled = scheduler_output.num_scheduled_tokens
        return super().execute_model(scheduler_output, intermediate_tensors)

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> tuple[dict, None]:
        return {}, None

    def _model_forward(
        self,
        input_ids: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        """Run the step's passes. Returns [scheduled, H], loop-T states of prompt positions."""
        assert input_ids is not None
        batch = self.input_batch
        self._in_step = [self._loop_request(req_id) for req_id in batch.req_ids]
        work = [
            request.work(
                start=int(batch.num_computed_tokens_cpu[index]),
                count=self._scheduled[req_id],
                known=self.requests[req_id].num_tokens,
                max_model_len=self.max_model_len,
            )
            for index, (req_id, request) in enumerate(
                zip(batch.req_ids, self._in_step, strict=True)
            )
        ]
        self._slots = np.array([request.slot for request in self._in_step], np.int64)
        self._pages = LoopPages(
            batch.block_table[0].block_table.np, self._block_size, self.loop_config.loops
        )
        states = [self.requests[req_id] for req_id in batch.req_ids]
        drop_ended_budgets(batch.sampling_metadata, [state.sampling_params for state in states])
        self._step_sampler = StepSampler(
            self.sampler,
            batch.sampling_metadata,
            [state.output_token_ids for state in states],
        )
        plan = StepPlan(work, self.loop_config.loops)
        embedded = self.model.embed_input_ids(input_ids[: plan.scheduled])
        result = self.executor.run(plan, embedded, self, bool(self.num_prompt_logprobs))
        notes = note_tokens(result.readouts, len(work), self.loop_config.loops)
        self._notes = dict(zip(batch.req_ids, notes, strict=True))
        for request, noted, carried in zip(self._in_step, notes, result.carried, strict=True):
            request.depths += noted[:, 0].tolist()
            request.carried = carried
        self._result: StepResult = result
        # The base class computes logits next: give it those of deferred requests, and only them.
        self.model.compute_logits = self._deferred_logits
        return embedded if result.hidden is None else result.hidden

    def _deferred_logits(self, _: torch.Tensor) -> torch.Tensor:
        """Logits [R, vocab] with rows for the deferred requests; [0, vocab] if there are none."""
        del self.model.compute_logits
        deferred = self._result.deferred
        vocab = self.model_config.get_vocab_size()
        if not deferred:
            return torch.empty(0, vocab)
        rows = self.model.compute_logits(torch.stack(list(deferred.values())))
        logits = rows.new_zeros(self.input_batch.num_reqs, vocab)
        logits[torch.tensor(list(deferred))] = rows
        return logits

    def _sample(self, logits: torch.Tensor | None, spec_decode_metadata: Any) -> SamplerOutput:
        assert spec_decode_metadata is None and logits is not None
        deferred = np.array(sorted(self._result.deferred), np.int64)
        if len(deferred):
            self._step_sampler.sample(deferred, logits[torch.from_numpy(deferred)])
        self.discard_request_mask.np[: self.input_batch.num_reqs] = False
        tokens, logprobs = self._step_sampler.finish()
        return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=logprobs)

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)
        result = getattr(self, "_result", None)
        if result is not None and output.sampled_token_ids:
            report = StepReport(
                pass_rows=result.pass_rows,
                rows_by_loop=result.rows_by_loop.tolist(),
                tokens=sum(map(len, output.sampled_token_ids)),
                seconds=result.seconds,
            )
            output.ouro = StepOutput(self._notes, report)
            del self._result
        return output

    # ---- a pass (ouro_runtime.loop.executor.PassRunner) ---------------------------------------

    def prepare(self, rows: Rows, segments: Segments) -> None:
        slots = torch.from_numpy(self._pages.slots(rows.req, rows.pos, rows.loop))
        longest = int(segments.seq_len.max())
        first = torch.from_numpy(segments.first)
        metadata = self._metadata_builder.build(
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
                    self._pages.tables(segments.req, segments.loop, longest)
                ),
                slot_mapping=slots,
                causal=True,
            ),
        )
        debts = self._stand_ins.due(
            self._slots[segments.req],
            segments.loop,
            segments.seq_len.astype(np.int64) - 1,
            self._pages.block_table,
            segments.req,
        )
        self._cells = get_forward_context().attn_metadata = Cells(metadata, debts)

    def run_pass(
        self, hidden: torch.Tensor, rows: Rows
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        hidden, halt = self.model.model(hidden, torch.from_numpy(rows.pos))
        return hidden, halt, self._cells.seconds

    def embed(self, tokens: np.ndarray) -> torch.Tensor:
        ids, table = torch.from_numpy(tokens), self.model.model.embed_tokens
        if table.tp_size == 1 and type(table.quant_method) is UnquantizedEmbeddingMethod:
            return torch.nn.functional.embedding(ids, table.weight)
        return self.model.embed_input_ids(ids)

    def sample(self, req: np.ndarray, hidden: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        tokens = self._step_sampler.sample(req, type(self.model).compute_logits(self.model, hidden))
        pairs = zip(req.tolist(), tokens.tolist(), strict=True)
        return tokens, np.array([token in self._in_step[i].stops for i, token in pairs], bool)

    def stand_in(self, left: Left) -> None:
        self._stand_ins.owe(self._slots[left.req], left.pos, left.depth)

    def margin(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = type(self.model).compute_logits(self.model, hidden)
        top = logits.float().softmax(dim=-1).topk(2, dim=-1).values
        return top[:, 0] - top[:, 1]
