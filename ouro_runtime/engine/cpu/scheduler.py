"""Seam: vLLM's synchronous scheduler, for steps that yield from none to T tokens per request.

After a step a request's `num_computed_tokens` moves by the tokens it yielded; what both schedulers
of looped models do is in `scheduler_common.py` and `scheduler_pages.py`. Here it is also decided,
step by step, whether lossless requests are drafted, and slots are reserved for what drafts have in
flight; blocks of `skip` are folded (`folding.py`), and requests end whose adapter is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

from ouro_runtime.config import SHARED, ExitParams
from ouro_runtime.engine.cpu.folding import PageFolder
from ouro_runtime.engine.pin import check_parameters
from ouro_runtime.engine.scheduler_pages import PagedSchedulerMixin
from ouro_runtime.engine.step_output import StepOutput
from ouro_runtime.loop.drafts import DraftTrial
from ouro_runtime.loop.limits import abreast
from ouro_runtime.reports import StepReport

check_parameters(Scheduler._update_after_schedule, "scheduler_output")


class OuroScheduler(PagedSchedulerMixin, Scheduler):
    """Scheduler of looped models on CPU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert isinstance(self.grammar_compile_error_reqs, set), "the list of failed requests"
        self._left_at: dict[str, list[int]] = {}
        self._folder = PageFolder(self.kv_cache_manager.coordinator.single_type_managers)
        # T - 1 positions in flight, and T - 1 that a step starts.
        if self.loop_config.drafts:
            self.num_lookahead_tokens = 2 * (self.loop_config.loops - 1)
        self.draft_trial: DraftTrial | None = DraftTrial()

    # ---- pages by loop ------------------------------------------------------------------------

    def _open(self, request_id: str, params: ExitParams, deepest: int) -> None:
        if params.exit_mode == SHARED:
            self._left_at[request_id] = []
        elif params.exit_mode == "skip":
            prompt = self.requests[request_id].num_prompt_tokens
            self._folder.open(request_id, prompt, deepest)

    def _free_request_blocks(self, request: Request) -> None:
        super()._free_request_blocks(request)
        self._folder.free(request.request_id, request.is_finished())
        if request.is_finished():
            self._left_at.pop(request.request_id, None)

    def _chunk_again(self, request: Request, start: int) -> int:
        """A chunk ends with the first position that went deeper than loop 1."""
        return abreast(self._left_at[request.request_id], request.num_prompt_tokens, start)

    def _settle_pages(self, scheduled: Iterable[str]) -> None:
        """Nothing is in flight, what was scheduled has been computed: let go of pages that running
        requests do not need any more."""
        for req_id in scheduled:
            request = self.requests.get(req_id)
            if request is None or request.status != RequestStatus.RUNNING:
                continue
            if request.num_computed_tokens >= request.num_prompt_tokens:
                self._let_go(req_id)
            self._folder.fold(req_id, request.num_computed_tokens, self._deepest[req_id])

    # ---- steps --------------------------------------------------------------------------------

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        super()._update_after_schedule(scheduler_output)
        scheduler_output.ouro_folds = self._folder.take()
        scheduler_output.ouro_drafts = self.loop_config.drafts and (
            self.draft_trial is None
            or self.draft_trial.decide(len(scheduler_output.num_scheduled_tokens))
        )

    def update_from_output(
        self, scheduler_output: Any, model_runner_output: Any
    ) -> dict[int, EngineCoreOutputs]:
        step: StepOutput | None = getattr(model_runner_output, "ouro", None)
        failed = self._fail(step.lost, model_runner_output) if step is not None else {}
        at_head = {}
        if step is not None:
            for req_id in scheduler_output.num_scheduled_tokens:
                request = self.requests.get(req_id)
                if request is not None and request.num_computed_tokens >= request.num_tokens:
                    at_head[req_id] = request
        result = super().update_from_output(scheduler_output, model_runner_output)
        for outputs in result.values() if failed else ():
            for output in outputs.outputs:
                output.stop_reason = failed.get(output.request_id, output.stop_reason)
        scheduled = scheduler_output.num_scheduled_tokens
        if step is None:
            self._settle_pages(scheduled)
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
                self._folder.step(req_id, depths)
                if req_id in self._left_at:
                    self._left_at[req_id] += depths
        self._settle_pages(scheduled)
        self._report_pages(result, step.report)
        return result

    def _fail(self, lost: Mapping[int, str], output: Any) -> dict[str, str]:
        """End the requests of a step whose adapters were lost, by id, with an error: why, by
        request. What they brought is void, and so are the pages that it would be shared in."""
        failed = {}
        for index, req_id in enumerate(output.req_ids if lost else ()):
            request = self.requests.get(req_id)
            adapter = None if request is None else request.lora_request
            if adapter is None or adapter.lora_int_id not in lost:
                continue
            failed[req_id] = lost[adapter.lora_int_id]
            if output.sampled_token_ids:
                output.sampled_token_ids[index] = []
            output.prompt_logprobs_dict.pop(req_id, None)
            output.prompt_token_id_logprobs_dict.pop(req_id, None)
            held = self.kv_cache_manager.get_blocks(req_id).blocks
            pages = {block.block_id for blocks in held for block in blocks}
            self.kv_cache_manager.evict_blocks(pages)
        # vLLM's list of what ends with an error after this step.
        self.grammar_compile_error_reqs.update(failed)
        return failed
