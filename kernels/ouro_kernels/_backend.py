"""Which implementation a call uses: Triton where it can run, the reference elsewhere."""

import functools
import importlib
import os
from types import ModuleType

import torch


@functools.cache
def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter.

    Read once: Triton binds the choice when a kernel is defined, so a later change of the
    environment would make this answer and the loaded kernels disagree.
    """
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def backend(op: str, tensor: torch.Tensor) -> ModuleType:
    """Triton for CUDA tensors, and for CPU tensors when the interpreter is on; else the reference.

    Imported on the first call, so that the package works where Triton is not installed.
    """
    chosen = "triton" if tensor.is_cuda or interpreting() else "reference"
    return importlib.import_module(f"ouro_kernels.{op}.{chosen}")
