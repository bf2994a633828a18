"""Seam: vLLM's synchronous scheduler, for steps that yield from none to T tokens per request.

After a step a request's `num_computed_tokens` moves by the tokens it yielded; what both schedulers
of looped models do is in `scheduler_common.py`.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs

from ouro_runtime.engine.scheduler_common import LoopSchedulerMixin
from ouro_runtime.engine.step_output import StepOutput


class OuroScheduler(LoopSchedulerMixin, Scheduler):
    """Scheduler of looped models on CPU."""

    def update_from_output(
        self, scheduler_output: Any, model_runner_output: Any
    ) -> dict[int, EngineCoreOutputs]:
        step: StepOutput | None = getattr(model_runner_output, "ouro", None)
        at_head = {}
        if step is not None:
            for req_id in scheduler_output.num_scheduled_tokens:
                request = self.requests.get(req_id)
                if request is not None and request.num_computed_tokens >= request.num_tokens:
                    at_head[req_id] = request
        result = super().update_from_output(scheduler_output, model_runner_output)
        if step is None:
            return result
        self._add_depths(result, step)
        for req_id, request in at_head.items():
            if req_id in self.requests and not request.is_finished():
                depths = step.depths(req_id)
                request.num_computed_tokens += len(depths) - 1
                self._advance_clean(request, depths, request.num_computed_tokens)
        self._send_report(result, step)
        return result
