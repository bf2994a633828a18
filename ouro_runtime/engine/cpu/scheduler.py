"""Seam: vLLM's synchronous scheduler, for steps that yield from none to T tokens per request.

After a step a request's `num_computed_tokens` moves by the tokens it yielded; what both schedulers
of looped models do is in `scheduler_common.py` and `scheduler_pages.py`. Here it is also decided,
step by step, whether lossless requests are drafted, and slots are reserved for what drafts have in
flight.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.request import RequestStatus

from ouro_runtime.engine.pin import check_parameters
from ouro_runtime.engine.scheduler_pages import PagedSchedulerMixin
from ouro_runtime.engine.step_output import StepOutput
from ouro_runtime.loop.drafts import DraftTrial
from ouro_runtime.reports import StepReport

check_parameters(Scheduler._update_after_schedule, "scheduler_output")


class OuroScheduler(PagedSchedulerMixin, Scheduler):
    """Scheduler of looped models on CPU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # T - 1 positions in flight, and T - 1 that a step starts.
        if self.loop_config.drafts:
            self.num_lookahead_tokens = 2 * (self.loop_config.loops - 1)
        self.draft_trial: DraftTrial | None = DraftTrial()

    # ---- steps --------------------------------------------------------------------------------

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        super()._update_after_schedule(scheduler_output)
        scheduler_output.ouro_drafts = self.loop_config.drafts and (
            self.draft_trial is None
            or self.draft_trial.decide(len(scheduler_output.num_scheduled_tokens))
        )

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
        scheduled = scheduler_output.num_scheduled_tokens
        if step is None:
            self._let_go_of_complete(scheduled)
            if not self.requests:
                self._report_pages(result, StepReport())
            return result
        decoding = len(at_head) == len(scheduled) == sum(scheduled.values())
        if self.draft_trial is not None and step.guided and decoding:
            report = step.report
            self.draft_trial.note(len(scheduled), sum(report.seconds.values()), report.tokens)
        self._add_depths(result, step)
        for req_id, request in at_head.items():
            if req_id in self.requests and not request.is_finished():
                depths = step.depths(req_id)
                request.num_computed_tokens += len(depths) - 1
                self._advance_clean(request, depths, request.num_computed_tokens)
        self._let_go_of_complete(scheduled)
        self._report_pages(result, step.report)
        return result

    def _let_go_of_complete(self, scheduled: Iterable[str]) -> None:
        """Nothing is in flight: what was scheduled has been computed."""
        for req_id in scheduled:
            request = self.requests.get(req_id)
            if request is None or request.status != RequestStatus.RUNNING:
                continue
            if request.num_computed_tokens >= request.num_prompt_tokens:
                self._let_go(req_id)
