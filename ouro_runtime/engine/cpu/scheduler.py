"""Seam: vLLM's synchronous scheduler, for steps that yield from none to T tokens per request.

After a step a request's `num_computed_tokens` moves by the tokens it yielded; what both schedulers
of looped models do is in `scheduler_common.py`. A page is that of a loop (`pages.py`), or
of several (`folding.py`). Here it is also decided, step by step, whether lossless requests are
drafted, and slots are reserved for what drafts have in flight.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

from ouro_runtime.config import SHARED
from ouro_runtime.engine.cpu.folding import PageFolder
from ouro_runtime.engine.cpu.pages import keep_book, only_loops, pages_held
from ouro_runtime.engine.pin import check_parameters
from ouro_runtime.engine.requests import deepest_loop_of
from ouro_runtime.engine.scheduler_common import LoopSchedulerMixin
from ouro_runtime.engine.step_output import StepOutput
from ouro_runtime.loop.drafts import DraftTrial
from ouro_runtime.loop.limits import abreast
from ouro_runtime.reports import StepReport

COUNT_SECONDS = 1.0
"""Between two counts of the pages that requests hold."""

check_parameters(Scheduler._update_after_schedule, "scheduler_output")
check_parameters(
    Scheduler._mamba_block_aligned_split,
    *("request", "num_new_tokens", "num_new_local_computed_tokens"),
)


class OuroScheduler(LoopSchedulerMixin, Scheduler):
    """Scheduler of looped models on CPU."""

    need_mamba_block_aligned_split: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert not self.need_mamba_block_aligned_split, "another feature ends chunks early"
        self.need_mamba_block_aligned_split = True
        assert isinstance(self.grammar_compile_error_reqs, set), "the list of failed requests"
        # T - 1 positions in flight, and T - 1 that a step starts.
        if self.loop_config.drafts:
            self.num_lookahead_tokens = 2 * (self.loop_config.loops - 1)
        self.draft_trial: DraftTrial | None = DraftTrial()

    # ---- pages by loop: ouro_runtime.engine.cpu.pages.Book ------------------------------------

    def _guard_cache(self, coordinator: Any) -> None:
        self._counted = 0.0
        self._deepest: dict[str, int] = {}
        self._shared: dict[str, bool] = {}
        self._left_at: dict[str, list[int]] = {}
        keep_book(self.kv_cache_manager, self, self.loop_config.loops)
        self._folder = PageFolder(coordinator.single_type_managers)
        self._publish = coordinator.cache_blocks

    def deepest(self, request_id: str) -> int:
        found = self._deepest.get(request_id)
        if found is None:
            request = self.requests[request_id]
            params, loops = self._exit_params(request), self.loop_config.loops
            found = deepest_loop_of(request.sampling_params, params, loops)
            self._deepest[request_id] = found
            if params.exit_mode == SHARED:
                self._shared[request_id], self._left_at[request_id] = False, []
            elif params.exit_mode == "skip":
                self._folder.open(request_id, request.num_prompt_tokens, found)
        return found

    def held(self, request_id: str, loop: int, num_tokens: int) -> int:
        if loop >= self.deepest(request_id):
            return 0
        if request_id not in self._shared or loop == self.loop_config.loops - 1:
            return num_tokens
        over = self._shared[request_id]
        return 0 if over else min(num_tokens, self.requests[request_id].num_prompt_tokens)

    def clean(self, request: Request, loop: int) -> int:
        clean = self._clean.get(request.request_id)
        return request.num_prompt_tokens if clean is None else clean.by_loop[loop]

    def _clean_length(self, request: Request) -> int:
        return self.clean(request, self.deepest(request.request_id) - 1)

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[Any, int, int, bool]:
        with only_loops(self.kv_cache_manager.coordinator, self.deepest(request.request_id)):
            return super()._get_local_prefix_cache_hit(request)

    def _free_request_blocks(self, request: Request) -> None:
        super()._free_request_blocks(request)
        self._folder.free(request.request_id, request.is_finished())
        if request.is_finished():
            self._deepest.pop(request.request_id, None)
            self._shared.pop(request.request_id, None)
            self._left_at.pop(request.request_id, None)
        elif request.request_id in self._shared:
            self._shared[request.request_id] = False

    # ---- `shared` -----------------------------------------------------------------------------

    def _mamba_block_aligned_split(
        self, request: Request, num_new_tokens: int, num_new_local_computed_tokens: int = 0, *_: Any
    ) -> int:
        """In place of vLLM's hook that ends a chunk early. In `shared` a position reads, at every
        loop, what those before it left at their last: a prompt is complete before what it brought
        is computed again, and of that a chunk ends with the first position that went deeper."""
        self.deepest(request.request_id)
        if request.request_id not in self._shared:
            return num_new_tokens
        start = request.num_computed_tokens + num_new_local_computed_tokens
        prompt = request.num_prompt_tokens
        if start < prompt:
            return min(num_new_tokens, prompt - start)
        return min(num_new_tokens, abreast(self._left_at[request.request_id], prompt, start))

    def _let_go(self, scheduled: Iterable[str]) -> None:
        """Of requests in `shared` whose prompt is complete, only loop T's pages stay."""
        for req_id in scheduled:
            request = self.requests.get(req_id)
            if request is None or self._shared.get(req_id, True):
                continue
            running = request.status == RequestStatus.RUNNING
            if running and request.num_computed_tokens >= request.num_prompt_tokens:
                self._shared[req_id] = True
                for manager in self.kv_cache_manager.coordinator.single_type_managers[:-1]:
                    manager.let_go(req_id)

    # ---- `skip` -------------------------------------------------------------------------------

    def _fold(self, scheduled: Iterable[str]) -> None:
        """Of requests in `skip`, blocks that no position went deep in need no deeper pages."""
        for req_id in scheduled:
            request = self.requests.get(req_id)
            if request is not None and request.status == RequestStatus.RUNNING:
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
            self._let_go(scheduled)
            self._fold(scheduled)
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
        self._let_go(scheduled)
        self._fold(scheduled)
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

    def _report_pages(self, result: dict[int, EngineCoreOutputs], report: StepReport) -> None:
        """Send what a step did, now and then with the pages held, and always when none are left."""
        if not self.log_stats:
            return
        now = time.monotonic()
        if now - self._counted >= COUNT_SECONDS or not self.requests:
            self._counted = now
            report.kv_pages = pages_held(self.kv_cache_manager)
        self._send_report(result, report)
