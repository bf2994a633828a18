"""Seam: vLLM's CPU worker, with our model runner in place of its own, and a compile cache that
loads."""

from typing import Any
from unittest import mock

import torch
from vllm.v1.worker import cpu_worker

from ouro_runtime.engine.cpu_runner import OuroCPUModelRunner

load_compiled = torch.compiler.load_compiled_function


def load_finished(*args: Any, **kwargs: Any) -> Any:
    """A function that was compiled at an earlier start.

    vLLM 0.32 goes on to finish loading it, as its own backends need; what torch's backend compiled,
    which is what the CPU platform uses, is finished, but vLLM would compile again.
    """
    loaded = load_compiled(*args, **kwargs)
    compiled = loaded._artifacts.compiled_fn
    if not hasattr(compiled, "finalize_loading"):
        compiled.finalize_loading = lambda vllm_config: None
    return loaded


class OuroCPUWorker(cpu_worker.CPUWorker):
    """`--worker-cls` on CPU. vLLM names the runner in `init_device` and nowhere else."""

    def init_device(self) -> None:
        with mock.patch.object(cpu_worker, "CPUModelRunner", OuroCPUModelRunner):
            super().init_device()
        assert isinstance(self.model_runner, OuroCPUModelRunner), type(self.model_runner)

    def determine_available_memory(self) -> int:
        with mock.patch.object(torch.compiler, "load_compiled_function", load_finished):
            return super().determine_available_memory()
