"""Seam: vLLM's CPU worker, with our model runner in place of its own, and a compile cache that
loads."""

import os
import platform
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch._inductor import config as inductor
from torch._inductor import cpu_vec_isa
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.cpp_builder import get_cpp_compiler
from vllm.v1.worker import cpu_worker

from ouro_runtime.engine.cpu.runner import OuroCPUModelRunner

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


@contextmanager
def quick_compiler() -> Iterator[None]:
    """Torch's compiler on every core of the machine, and without asking what it can know.

    It would compile one kernel after the other, on a core that this process is bound to, after
    a header that only pays for many kernels and programs that only show whether the C++ compiler
    knows the processor's instructions.
    """
    cores = range(os.cpu_count() or 1)
    everyone = threading.Barrier(len(cores))

    def unbind(_: int) -> None:
        everyone.wait()
        os.sched_setaffinity(0, cores)

    settings = {
        "compile_threads": max(2, len(cores)),
        "cpp.vec_isa_ok": knows_instructions() or inductor.cpp.vec_isa_ok,
        "cpp_cache_precompile_headers": False,
    }
    with inductor.patch(settings):
        list(AsyncCompile.pool().map(unbind, cores))
        yield


def knows_instructions() -> bool:
    """Whether the C++ compiler takes the options of all vector instructions that the processor has,
    as far as torch knows them; if not, torch finds out which ones work."""
    if platform.machine() != "x86_64":
        return False
    has = cpu_vec_isa.x86_isa_checker()
    known = [isa for isa in cpu_vec_isa.supported_vec_isa_list if set(str(isa).split()) <= set(has)]
    options = " ".join(isa.build_arch_flags() for isa in known).split()
    command = [get_cpp_compiler(), *options, "-E", "-x", "c++", os.devnull]
    try:
        return subprocess.run(command, capture_output=True, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


class OuroCPUWorker(cpu_worker.CPUWorker):
    """`--worker-cls` on CPU. vLLM names the runner in `init_device` and nowhere else."""

    def init_device(self) -> None:
        with mock.patch.object(cpu_worker, "CPUModelRunner", OuroCPUModelRunner):
            super().init_device()
        assert isinstance(self.model_runner, OuroCPUModelRunner), type(self.model_runner)

    def determine_available_memory(self) -> int:
        with (
            mock.patch.object(torch.compiler, "load_compiled_function", load_finished),
            quick_compiler(),
        ):
            return super().determine_available_memory()
