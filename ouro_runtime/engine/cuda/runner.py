"""Seam: vLLM's V2 model runner, where `ModelState` has no hook for what is needed.

- `execute_model`: the model state hears whom the scheduler wants drafted;
- `sample_tokens`: the step's depths ride on its output;
- `finish_requests`: tells a request that has ended from one that was preempted;
- `profile_cudagraph_memory`: graphs and caches made for the estimate are dropped with it;
- `capture_model`: says so if decoding has no graphs.
"""

from __future__ import annotations

import gc
import logging
from collections import deque
from typing import Any

import torch
from vllm.distributed.parallel_state import get_tp_group
from vllm.v1.worker.gpu.async_utils import AsyncOutput
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from ouro_runtime.engine import pages
from ouro_runtime.engine.cuda import pin, refuse
from ouro_runtime.engine.cuda.output import LaneOutput
from ouro_runtime.engine.cuda.state import OuroModelState

logger = logging.getLogger("vllm.ouro")


class OuroGPUModelRunner(GPUModelRunner):
    """Runs looped models on CUDA."""

    model_state: OuroModelState

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        refuse.refuse(vllm_config)
        pages.register()  # a worker's process has no scheduler, but groups layers itself
        super().__init__(vllm_config, device)
        self._unread: deque[LaneOutput] = deque()

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        self.model_state.drafts = getattr(scheduler_output, "ouro_drafts", {})
        return super().execute_model(scheduler_output, *args, **kwargs)

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)
        bill = self.model_state.take_bill()
        if bill is None or not isinstance(output, AsyncOutput):
            return output
        lanes = LaneOutput(
            output, bill, self.model_state.note, self.main_stream, self.output_copy_stream
        )
        if get_tp_group().rank_in_group:
            self._read_unasked(lanes)
        return lanes

    def _read_unasked(self, output: LaneOutput) -> None:
        """vLLM asks only the first process of a tensor-parallel group for its outputs. The others
        need the depths as well, before the scheduler can bring a preempted request back."""
        self._unread.append(output)
        while len(self._unread) >= self.vllm_config.max_concurrent_batches:
            self._unread.popleft().get_output()

    def finish_requests(self, scheduler_output: Any) -> None:
        super().finish_requests(scheduler_output)
        self.model_state.requests.forget(scheduler_output.finished_req_ids)

    def profile_cudagraph_memory(self) -> int:
        try:
            return super().profile_cudagraph_memory()
        finally:
            # After vLLM emptied the allocator's cache; what we let go of must not stay in there,
            # or it is counted as in use when the room for K/V is measured.
            self.model_state.release()
            gc.collect()
            torch.accelerator.empty_cache()

    def capture_model(self, *, profile_only: bool = False) -> int:
        used = super().capture_model(profile_only=profile_only)
        if not profile_only:
            self._report_graphs()
        return used

    def _report_graphs(self) -> None:
        """Say what runs without graphs, to who did not ask for that (`--enforce-eager`)."""
        captured, most = self.model_state.graphs.buckets, self.max_num_reqs
        if not captured:
            logger.warning(
                "Ouro Serve: decoding runs WITHOUT CUDA graphs and is bound by the host: vLLM "
                "captures nothing in cudagraph mode %s with compilation mode %s",
                self.compilation_config.cudagraph_mode,
                self.compilation_config.mode,
            )
        elif captured[-1] < most:
            logger.warning(
                "Ouro Serve: steps of more than %d requests run WITHOUT CUDA graphs, and up to %d "
                "may run at once (--max-num-seqs); --max-cudagraph-capture-size %d captures them",
                captured[-1],
                most,
                most,
            )


class OuroGPUWorker(Worker):
    """`--worker-cls` on CUDA."""

    def _make_model_runner(self) -> Any:
        if not torch.cuda.is_available():
            raise RuntimeError(
                "Ouro Serve's CUDA engine was asked for, but torch sees no CUDA device"
            )
        if not self.use_v2_model_runner:
            raise RuntimeError("Ouro Serve on CUDA needs vLLM's V2 model runner")
        pin.check()
        return OuroGPUModelRunner(self.vllm_config, self.device)
