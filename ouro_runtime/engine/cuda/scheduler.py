"""Seam: vLLM's asynchronous scheduler, for steps that yield from none to T tokens per request.

A step is scheduled before the one before it has come back. vLLM then counts the tokens to come as
placeholders, and a request's computed positions as if they had come. A looped step brings a number
of tokens that only the device knows; so the most it can bring is counted, and put right when the
step is back (as vLLM does with rejected drafts). What is counted is never less than what is true,
so the slots reserved for a step hold whatever it writes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

from ouro_runtime.config import LOSSLESS, ExitParams
from ouro_runtime.engine.cuda.buckets import draft_lanes
from ouro_runtime.engine.cuda.draft_choice import DraftChoice
from ouro_runtime.engine.pin import check_parameters
from ouro_runtime.engine.requests import LoopRequest
from ouro_runtime.engine.scheduler_pages import PagedSchedulerMixin
from ouro_runtime.engine.step_output import StepOutput
from ouro_runtime.loop.drafts import draft_rule
from ouro_runtime.loop.limits import last_readout
from ouro_runtime.reports import StepReport

check_parameters(AsyncScheduler._update_after_schedule, "scheduler_output")
check_parameters(AsyncScheduler._update_request_with_output, "request", "new_token_ids", "is_stale")


def most_tokens(params: ExitParams, single: bool, loops: int) -> int:
    """Most tokens that a step of T passes can bring a decoding request that is not drafted in it.

    A head may leave after the step's first pass; every later one runs its least depth at least.
    """
    if single or params.exit_mode in ("exact", LOSSLESS):
        return 1
    if params.forced_depths:
        least = min(params.forced_depths)
    else:
        least = params.min_loops if params.exit_threshold < 1.0 else params.max_loops
    if least == loops:
        return 1
    return 1 + (loops - 1) // least


class OuroAsyncScheduler(PagedSchedulerMixin, AsyncScheduler):
    """Scheduler of looped models on CUDA; also right where only one step is in flight.

    Between steps, of a request that is past its prompt and knows n tokens,
    `num_output_placeholders` is the most tokens that the steps in flight can still bring, and
    `num_computed_tokens` is n - 1 more than that.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.loop_config
        sizes = self.vllm_config.compilation_config.cudagraph_capture_sizes or ()
        lanes = draft_lanes(sizes, self.max_num_running_reqs, config.loops, config.drafts)
        self.drafts = DraftChoice(config.loops, lanes)
        if lanes:
            # T - 1 positions in flight, and T - 1 that a step starts.
            self.num_lookahead_tokens = 2 * (config.loops - 1)
        self._filled: dict[str, int] = {}
        self._most: dict[str, int] = {}
        # Exit controls of requests that may be drafted, None of others.
        self._draftable: dict[str, ExitParams | None] = {}
        self._flight: dict[str, deque[int]] = {}

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        for new in scheduler_output.scheduled_new_reqs:
            # Positions before this are filled in by prompt chunks; such a step brings one token.
            self._filled[new.req_id] = len(new.prefill_token_ids)
            # What a preempted request has in flight still is void.
            stale = self._flight.get(new.req_id, ())
            self._flight[new.req_id] = deque([0] * len(stale))
        scheduled = scheduler_output.num_scheduled_tokens
        decoding = {
            req_id: self.requests[req_id].num_computed_tokens >= self._filled[req_id]
            for req_id in scheduled
        }
        super()._update_after_schedule(scheduler_output)
        drafts = self._drafts(scheduled) if all(decoding.values()) else {}
        scheduler_output.ouro_drafts = drafts
        brings = set()
        for req_id in scheduled:
            request = self.requests[req_id]
            if not request.is_prefill_chunk:
                most = self._most_tokens(request) if decoding[req_id] else 1
                if req_id in drafts:
                    # One position is confirmed after each pass at most.
                    most = self.loop_config.loops
                self._flight[req_id].append(most)
                self._expect(request, request.num_tokens)
                brings.add(req_id)
        scheduler_output.ouro_brings = brings

    def _drafts(self, scheduled: Mapping[str, int]) -> dict[str, int]:
        """See `DraftChoice.choose`."""
        if not self.drafts.lanes:
            return {}
        for req_id in scheduled.keys() - self._draftable.keys():
            loop = self._loop_request(self.requests[req_id])
            never = draft_rule(loop.params, loop.single, self.loop_config.loops) is None
            self._draftable[req_id] = None if never else loop.params
        asked = {r: params for r in scheduled if (params := self._draftable[r]) is not None}
        return self.drafts.choose(asked, len(scheduled)) if asked else {}

    def _expect(self, request: Request, known: int) -> None:
        """Count what the steps in flight can bring a request of `known` tokens."""
        # At `last` its last token is read out, which then is the token at `last + 1`.
        last = last_readout(request.num_prompt_tokens, request.max_tokens, self.max_model_len)
        most = min(sum(self._flight[request.request_id]), max(0, last + 2 - known))
        request.num_output_placeholders = most
        request.num_computed_tokens = known - 1 + most

    def _most_tokens(self, request: Request) -> int:
        most = self._most.get(request.request_id)
        if most is None:
            loop = self._loop_request(request)
            most = most_tokens(loop.params, loop.single, self.loop_config.loops)
            self._most[request.request_id] = most
        return most

    def _loop_request(self, request: Request) -> LoopRequest:
        return LoopRequest.of(request.sampling_params, request.num_prompt_tokens, self.loop_config)

    def update_from_output(
        self, scheduler_output: Any, model_runner_output: Any
    ) -> dict[int, EngineCoreOutputs]:
        step: StepOutput | None = getattr(model_runner_output, "ouro", None)
        if step is None:
            result = super().update_from_output(scheduler_output, model_runner_output)
            if not self.requests:
                self._report_pages(result, StepReport())
            return result
        came, told = [], set()
        for req_id in scheduler_output.num_scheduled_tokens:
            request = self.requests.get(req_id)
            if request is None or request.is_finished():
                continue
            if req_id in scheduler_output.ouro_brings:
                self._flight[req_id].popleft()
            stale = request.num_stale_output_tokens > 0
            if stale and request.drop_stale_output:
                continue
            tokens = len(step.notes[req_id])
            came.append(request)
            if tokens and not stale:
                told.add(req_id)
            self.drafts.learn(req_id, step.notes[req_id])
            if req_id in scheduler_output.ouro_brings and not stale:
                self._expect(request, request.num_tokens + tokens)
                # vLLM takes off what came.
                request.num_output_placeholders += tokens
        result = super().update_from_output(scheduler_output, model_runner_output)
        self._add_depths(result, step)
        for request in came:
            depths = step.depths(request.request_id)
            if depths and not request.is_finished() and request.request_id in self.requests:
                running = request.status == RequestStatus.RUNNING
                written = request.num_computed_tokens - request.num_output_placeholders
                self._advance_clean(request, depths, written if running else 0)
                if running and request.request_id in told:
                    # Its prompt's last step has come back, and those in flight only decode.
                    self._let_go(request.request_id)
        self._report_pages(result, step.report)
        return result

    def _free_request_blocks(self, request: Request) -> None:
        if request.is_finished():
            self._filled.pop(request.request_id, None)
            self._most.pop(request.request_id, None)
            self._draftable.pop(request.request_id, None)
            self.drafts.close(request.request_id)
            self._flight.pop(request.request_id, None)
        super()._free_request_blocks(request)
