"""Our runner in vLLM's CPU worker, which names its own in `init_device` and nowhere else."""

from __future__ import annotations

from unittest import mock

from vllm.v1.worker import cpu_worker
from vllm.v1.worker.cpu import model_runner

from ouro_runtime.engine.cuda import pin as gpu_pin
from ouro_runtime.engine.cuda.runner import OuroGPUModelRunner


class BenchWorker(cpu_worker.CPUWorker):
    """In the place of `OuroGPUWorker`."""

    def init_device(self) -> None:
        gpu_pin.check()
        with mock.patch.object(model_runner, "CPUModelRunner", OuroGPUModelRunner):
            super().init_device()
        assert type(self.model_runner) is OuroGPUModelRunner
