"""Seam: vLLM's V1 CPU model runner, whose forward becomes the passes of a step.

What is overridden, and why:
- `_model_forward` runs the step's passes (vLLM runs the model once);
- `_build_attention_metadata` is skipped, since every pass builds its own;
- `_sample` hands over the tokens that the passes sampled, and samples the requests that need the
  host first (grammars), whose logits the model gave between the two (`cpu/model.py`);
- `sample_tokens` adds the step's depths to the output;
- `load_lora_model` puts `RowAdapters` in the place of what maps rows to adapters, and `GateManager`
  in that of what loads them;
- `set_active_loras` sees to all adapters of the batch (vLLM: one of each name).
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from vllm import _custom_ops as ops
from vllm.config import VllmConfig
from vllm.lora import model_manager
from vllm.lora.layers import base_linear
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.outputs import SamplerOutput
from vllm.v1.worker import lora_model_runner_mixin
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from ouro_runtime.cache.folding import fold_tables
from ouro_runtime.cache.pages import LoopPages
from ouro_runtime.cache.standin import StandIns
from ouro_runtime.config import LoopConfig
from ouro_runtime.engine.cpu.adapters import RowAdapters
from ouro_runtime.engine.cpu.gates import GateManager
from ouro_runtime.engine.cpu.row_state import follow_budgets
from ouro_runtime.engine.cpu.sampler import SettledSampler, StepSampler
from ouro_runtime.engine.cpu.step import CPUStep
from ouro_runtime.engine.pages import join_tables
from ouro_runtime.engine.pin import check_parameters
from ouro_runtime.engine.requests import LoopRequest
from ouro_runtime.loop.executor import StepExecutor
from ouro_runtime.loop.planner import StepPlan
from ouro_runtime.model.attention import LoopAttention

# What model/cpu_attention.py calls.
check_parameters(ops.cpu_attn_reshape_and_cache, "key_cache", "slot_mapping", "isa")
check_parameters(ops.cpu_attention_with_kv_cache, "query_start_loc", "scheduler_metadata", "s_aux")
check_parameters(CPUModelRunner._model_forward, "input_ids", "positions")
check_parameters(CPUModelRunner._sample, "logits", "spec_decode_metadata")
check_parameters(CPUModelRunner._build_attention_metadata, "num_tokens", "num_reqs")
check_parameters(CPUModelRunner._postprocess_tensors)
check_parameters(CPUModelRunner.load_lora_model, "model", "vllm_config", "device")
check_parameters(CPUModelRunner.set_active_loras, "input_batch")
check_parameters(CPUModelRunner._on_request_state_removed, "req_id", "req_state")


class OuroCPUModelRunner(CPUModelRunner):
    """Runs looped models on CPU; a step's own state is a `CPUStep`."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        options = self.model_config
        self.sampler = SettledSampler(options.logprobs_mode, options.use_fp64_gumbel)
        self.loop_config = LoopConfig.of(vllm_config)
        self.executor = StepExecutor(self.loop_config.loops)
        self.loop_requests: dict[str, LoopRequest] = {}
        self._step: CPUStep | None = None
        self._adapters: RowAdapters | None = None

    # ---- set-up -------------------------------------------------------------------------------

    def load_lora_model(self, model: Any, vllm_config: Any, device: torch.device) -> Any:
        self._adapters = adapters = RowAdapters(device)
        with (
            mock.patch.object(model_manager, "get_punica_wrapper", return_value=adapters),
            mock.patch.object(lora_model_runner_mixin, "LRUCacheWorkerLoRAManager", GateManager),
            # vLLM asks the weight, which a quantized layer on CPU has given to its kernel.
            mock.patch.object(base_linear, "_get_lora_device", return_value=device),
        ):
            loaded = super().load_lora_model(model, vllm_config, device)
        adapters.gated, adapters.lost = self.lora_manager.gated, self.lora_manager.lost
        return loaded

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        # vLLM has made the batch anew for the groups, its tensors not those of the CPU's rows.
        self._postprocess_tensors()
        groups = self.kv_cache_config.kv_cache_groups
        assert [group.kv_cache_spec.loop for group in groups] == list(range(self.loop_config.loops))
        for module in self.model.modules():
            if isinstance(module, LoopAttention):
                module.check_pages()
        (attention,) = self.attn_groups[0]
        assert attention.backend is CPUAttentionBackend, attention.backend
        self._metadata_builder = attention.get_metadata_builder()
        self._block_size = groups[0].kv_cache_spec.block_size
        for table in self.input_batch.block_table.block_tables:
            assert table.block_size == self._block_size, "pages differ from blocks"
        self._tables = join_tables(self.input_batch.block_table)
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
            self.executor.rule.open(request.slot)
            self.loop_requests[req_id] = request
        return request

    # ---- a step -------------------------------------------------------------------------------

    def set_active_loras(self, input_batch: Any, *args: Any, **kwargs: Any) -> None:
        # To vLLM, requests for adapters of one name are equal, and it keeps one of them. But what
        # was loaded anew under a name is another adapter, beside one that still runs.
        self.lora_manager.bring(input_batch.lora_id_to_lora_request.values())
        super().set_active_loras(input_batch, *args, **kwargs)

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> Any:
        # A request that was preempted is computed again, but for what the prefix cache still has:
        # what it had in flight is void.
        cached = scheduler_output.scheduled_cached_reqs
        for req_id, hit in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            request = self.loop_requests.get(req_id)
            if request is not None and req_id in cached.resumed_req_ids:
                request.carried = []
                request.draws.drop()
                self._stand_ins.rewind(request.slot, max(request.prompt, hit))
        for req_id, folds in getattr(scheduler_output, "ouro_folds", {}).items():
            state, row = self.requests[req_id], self.input_batch.req_id_to_index.get(req_id)
            rows = None if row is None else self._tables[:, row]
            fold_tables(state.block_ids, rows, self.loop_requests[req_id].deepest, folds)
        self._scheduled = scheduler_output.num_scheduled_tokens
        self._drafts = getattr(scheduler_output, "ouro_drafts", False)
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
        states = [self.requests[req_id] for req_id in batch.req_ids]
        requests = [self._loop_request(req_id) for req_id in batch.req_ids]
        params = [state.sampling_params for state in states]
        follow_budgets(batch.sampling_metadata, params, requests)
        start = batch.num_computed_tokens_cpu
        work = [
            request.work(
                start=int(start[index]),
                count=self._scheduled[req_id],
                known=state.num_tokens,
                max_model_len=self.max_model_len,
                drafts=self._drafts,
            )
            for index, (req_id, state, request) in enumerate(
                zip(batch.req_ids, states, requests, strict=True)
            )
        ]
        plan = StepPlan(work, self.loop_config.loops)
        embedded = self.model.embed_input_ids(input_ids[: plan.scheduled])
        self.model.step = step = CPUStep(
            model=self.model,
            requests=requests,
            sampler=StepSampler(
                self.sampler,
                batch.sampling_metadata,
                [state.output_token_ids for state in states],
                requests,
            ),
            pages=LoopPages(self._tables, self._block_size),
            stand_ins=self._stand_ins,
            metadata_builder=self._metadata_builder,
            adapters=self._adapters,
            adapter_ids=batch.request_lora_mapping[: len(requests)],
        )
        result = step.run(self.executor, plan, embedded, bool(self.num_prompt_logprobs))
        self._step = step
        return embedded if result.hidden is None else result.hidden

    def _sample(self, logits: torch.Tensor | None, spec_decode_metadata: Any) -> SamplerOutput:
        assert spec_decode_metadata is None and logits is not None and self._step is not None
        self.discard_request_mask.np[: self.input_batch.num_reqs] = False
        tokens, logprobs = self._step.finish(logits)
        return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=logprobs)

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)
        step, self._step = self._step, None
        if step is not None and output.sampled_token_ids:
            output.ouro = step.output(self.input_batch.req_ids, output.sampled_token_ids)
            if self._adapters is not None:
                output.ouro.lost = dict(self._adapters.lost)
        return output
