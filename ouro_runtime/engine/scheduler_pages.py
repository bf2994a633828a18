"""Seam: what vLLM's schedulers do not know of pages by loop (`pages.py`).

- how deep each request goes, and so which loops it holds pages of;
- `shared`: when a prompt is complete, its lower loops' pages are let go; what was generated is
  computed again in chunks that no position reads another of;
- the pages held, by loop, ride on a step's report now and then.
"""

from __future__ import annotations

import time
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.request import Request

from ouro_runtime.config import SHARED, ExitParams
from ouro_runtime.engine.pages import keep_book, only_loops, pages_held
from ouro_runtime.engine.pin import check_parameters
from ouro_runtime.engine.requests import deepest_loop_of
from ouro_runtime.engine.scheduler_common import LoopSchedulerMixin
from ouro_runtime.reports import StepReport

COUNT_SECONDS = 1.0
"""Between two counts of the pages that requests hold."""

check_parameters(
    Scheduler._mamba_block_aligned_split,
    *("request", "num_new_tokens", "num_new_local_computed_tokens"),
)


class PagedSchedulerMixin(LoopSchedulerMixin):
    """Comes before one of vLLM's schedulers among the bases of a class; the `Book` of its pages."""

    requests: dict[str, Request]
    need_mamba_block_aligned_split: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert not self.need_mamba_block_aligned_split, "another feature ends chunks early"
        self.need_mamba_block_aligned_split = True
        self._counted = 0.0
        self._deepest: dict[str, int] = {}
        self._shared: dict[str, bool] = {}
        keep_book(self.kv_cache_manager, self, self.loop_config.loops)

    # ---- ouro_runtime.engine.pages.Book -------------------------------------------------------

    def deepest(self, request_id: str) -> int:
        found = self._deepest.get(request_id)
        if found is None:
            request = self.requests[request_id]
            params, loops = self._exit_params(request), self.loop_config.loops
            found = deepest_loop_of(request.sampling_params, params, loops)
            self._deepest[request_id] = found
            if params.exit_mode == SHARED:
                self._shared[request_id] = False
            self._open(request_id, params, found)
        return found

    def _open(self, request_id: str, params: ExitParams, deepest: int) -> None:
        """A request is new."""

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
        if request.is_finished():
            self._deepest.pop(request.request_id, None)
            self._shared.pop(request.request_id, None)
        elif request.request_id in self._shared:
            self._shared[request.request_id] = False

    # ---- `shared` -----------------------------------------------------------------------------

    def _mamba_block_aligned_split(
        self, request: Request, num_new_tokens: int, num_new_local_computed_tokens: int = 0, *_: Any
    ) -> int:
        """In place of vLLM's hook that ends a chunk early. In `shared` a position reads, at every
        loop, what those before it left at their last: a prompt is complete before what it brought
        is computed again, and that in chunks of its own."""
        self.deepest(request.request_id)
        if request.request_id not in self._shared:
            return num_new_tokens
        start = request.num_computed_tokens + num_new_local_computed_tokens
        left = request.num_prompt_tokens - start
        return min(num_new_tokens, left if left > 0 else self._chunk_again(request, start))

    def _chunk_again(self, request: Request, start: int) -> int:
        """The most positions from `start` on that may be computed again together."""
        return 1

    def _let_go(self, request_id: str) -> None:
        """The prompt of a running request is complete, and nobody reads it any more at the loops
        that it does not need: in `shared` only loop T's pages stay."""
        if self._shared.get(request_id, True):
            return
        self._shared[request_id] = True
        for manager in self.kv_cache_manager.coordinator.single_type_managers[:-1]:
            manager.let_go(request_id)

    # ---- reports ------------------------------------------------------------------------------

    def _report_pages(self, result: dict[int, EngineCoreOutputs], report: StepReport) -> None:
        """Send what a step did, now and then with the pages held, and always when none are left."""
        if not self.log_stats:
            return
        now = time.monotonic()
        if now - self._counted >= COUNT_SECONDS or not self.requests:
            self._counted = now
            report.kv_pages = pages_held(self.kv_cache_manager)
        self._send_report(result, report)
