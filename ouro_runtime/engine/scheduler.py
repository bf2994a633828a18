"""Seam: vLLM's scheduler, for steps that yield from none to T tokens per request.

- `num_lookahead_tokens = T - 1` reserves the slots that a step may fill;
- after a step a request's `num_computed_tokens` moves by the tokens it yielded;
- the prefix cache is offered a block only when all its positions have true K/V at every loop;
- depths ride to the API process in `EngineCoreOutput.routed_experts` (see `outputs.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request

from ouro_runtime.cache.sharing import CleanPrefix
from ouro_runtime.config import ExitParams, LoopConfig
from ouro_runtime.engine.outputs import pack_depths, pack_report
from ouro_runtime.engine.pin import check_parameters
from ouro_runtime.engine.step_output import StepOutput

check_parameters(KVCacheCoordinator.cache_blocks, "request", "num_computed_tokens")
check_parameters(Scheduler.update_from_output, "scheduler_output", "model_runner_output")
check_parameters(Scheduler._free_request_blocks, "request")


class OuroScheduler(Scheduler):
    """Synchronous scheduler of looped models."""

    num_lookahead_tokens: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loop_config = LoopConfig.of(self.vllm_config)
        assert self.num_lookahead_tokens == 0, "another feature claims the lookahead slots"
        self.num_lookahead_tokens = self.loop_config.loops - 1
        self._clean: dict[str, CleanPrefix] = {}
        coordinator = self.kv_cache_manager.coordinator
        self._publish = coordinator.cache_blocks
        coordinator.cache_blocks = self._publish_clean

    def _publish_clean(self, request: Request, num_computed_tokens: int) -> None:
        """In place of the coordinator's `cache_blocks`: never past the clean prefix."""
        clean = self._clean.get(request.request_id)
        limit = clean.length if clean is not None else request.num_prompt_tokens
        self._publish(request, min(num_computed_tokens, limit))

    def update_from_output(
        self, scheduler_output: Any, model_runner_output: Any
    ) -> dict[int, EngineCoreOutputs]:
        step: StepOutput | None = getattr(model_runner_output, "ouro", None)
        scheduled = scheduler_output.num_scheduled_tokens
        at_head = {}
        if step is not None:
            for req_id in scheduled:
                request = self.requests.get(req_id)
                if request is not None and request.num_computed_tokens >= request.num_tokens:
                    at_head[req_id] = request
        result = super().update_from_output(scheduler_output, model_runner_output)
        if step is None:
            return result
        for outputs in result.values():
            for output in outputs.outputs:
                self._add_depths(output, step)
        for req_id, request in at_head.items():
            if req_id in self.requests and not request.is_finished():
                tokens = len(step.depths[req_id])
                request.num_computed_tokens += tokens - 1
                self._advance_clean(request, step.depths[req_id])
        self._send_report(result, step)
        return result

    def _advance_clean(self, request: Request, depths: list[int]) -> None:
        clean = self._clean.get(request.request_id)
        if clean is None:
            assert request.sampling_params is not None
            params = ExitParams.parse(
                request.sampling_params.extra_args,
                self.loop_config.defaults,
                self.loop_config.loops,
            )
            exact = params.exit_mode == "exact"
            clean = CleanPrefix(request.num_prompt_tokens, self.loop_config.loops, exact)
            self._clean[request.request_id] = clean
        clean.step(depths)
        if self.kv_cache_manager.enable_caching:
            self._publish_clean(request, request.num_computed_tokens)

    def _add_depths(self, output: EngineCoreOutput, step: StepOutput) -> None:
        tokens = len(output.new_token_ids)
        if tokens:
            depths = step.depths[output.request_id][:tokens]
            loops_run = step.loops_run[output.request_id][:tokens]
            output.routed_experts = pack_depths(depths, loops_run)

    def _send_report(self, result: dict[int, EngineCoreOutputs], step: StepOutput) -> None:
        if not self.log_stats:
            return
        outputs = next(iter(result.values()), None)
        if outputs is None:
            outputs = result[0] = EngineCoreOutputs()
        outputs.outputs.append(pack_report(step.report))

    def _free_request_blocks(self, request: Request) -> None:
        # Also called on preemption: positions computed again keep their depths, so the clean
        # prefix of what was generated stays known for as long as the request lives.
        if request.is_finished():
            self._clean.pop(request.request_id, None)
        super()._free_request_blocks(request)


assert hasattr(EngineCoreOutput, "routed_experts"), "the depth channel is gone"
assert np.dtype(np.int16).itemsize == 2
