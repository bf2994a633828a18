"""Seam: vLLM's V2 model runner, where `ModelState` has no hook for what is needed.

- `sample_tokens`: the step's depths ride on its output;
- `finish_requests`: tells a request that has ended from one that was preempted;
- `profile_cudagraph_memory`: graphs and caches made for the estimate are dropped with it.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from vllm.distributed.parallel_state import get_tp_group
from vllm.v1.worker.gpu.async_utils import AsyncOutput
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from ouro_runtime.engine import gpu_pin
from ouro_runtime.engine.gpu_output import LaneOutput
from ouro_runtime.engine.gpu_state import OuroModelState


class OuroGPUModelRunner(GPUModelRunner):
    """Runs looped models on CUDA."""

    model_state: OuroModelState

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unread: deque[LaneOutput] = deque()

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
            self.model_state.release()


class OuroGPUWorker(Worker):
    """`--worker-cls` on CUDA."""

    def _make_model_runner(self) -> Any:
        if not torch.cuda.is_available():
            raise RuntimeError(
                "Ouro Serve's CUDA engine was asked for, but torch sees no CUDA device"
            )
        if not self.use_v2_model_runner:
            raise RuntimeError("Ouro Serve on CUDA needs vLLM's V2 model runner")
        gpu_pin.check()
        return OuroGPUModelRunner(self.vllm_config, self.device)
