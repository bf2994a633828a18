"""Seam: vLLM's CPU worker, with our model runner in place of its own."""

from unittest import mock

from vllm.v1.worker import cpu_worker

from ouro_runtime.engine.cpu_runner import OuroCPUModelRunner


class OuroCPUWorker(cpu_worker.CPUWorker):
    """`--worker-cls` on CPU. vLLM names the runner in `init_device` and nowhere else."""

    def init_device(self) -> None:
        with mock.patch.object(cpu_worker, "CPUModelRunner", OuroCPUModelRunner):
            super().init_device()
        assert isinstance(self.model_runner, OuroCPUModelRunner), type(self.model_runner)
