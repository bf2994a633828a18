"""Kernel tests: compiled kernels on a GPU, Triton's interpreter without one.

Run as a process of their own (`pytest tests/kernels`): the interpreter is chosen when Triton is
first imported and holds for the whole process, so in a shared process another package's Triton
kernels would be interpreted too. The variable itself is set only while a kernel test runs.
"""

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

PACKAGES = Path(os.environ.get("OURO_KERNELS", Path(__file__).resolve().parents[2] / "kernels"))
"""Where the kernels are; `scripts/check_kernel_faults.py` names a copy with a fault in it."""

if str(PACKAGES) not in sys.path:
    sys.path.insert(0, str(PACKAGES))

OPS = (
    "exit_gate",
    "loop_decode_attention",
    "next_pass",
    "read_out",
    "rope_kv_write",
    "sandwich_norm",
    "standin_fill",
)

ON_GPU = torch.cuda.is_available()


def _bind_interpreter() -> None:
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        from ouro_kernels import _backend

        assert _backend.interpreting()
        for op in OPS:
            importlib.import_module(f"ouro_kernels.{op}.triton")
        importlib.import_module("ouro_kernels._interpreter").install()
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


if not ON_GPU:
    _bind_interpreter()


def pytest_report_header() -> str:
    import triton

    return f"triton {triton.__version__}, {'compiled' if ON_GPU else 'interpreted'}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if ON_GPU:
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory holds NaN, the most negative integer or True, so an unwritten output shows.

    What is written before or after it shows when the test ends.
    """
    from tests.kernels.support import Fenced, fenced

    empty = torch.empty
    fences: list[Fenced] = []

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        if tensor.dtype == torch.bool:
            tensor.fill_(True)
        elif tensor.is_floating_point():
            tensor.fill_(float("nan"))
        else:
            tensor.fill_(torch.iinfo(tensor.dtype).min)
        fences.append(fenced(tensor))
        return fences[-1].inside

    monkeypatch.setattr(torch, "empty", poisoned)
    yield
    for fence in fences:
        fence.check("a fresh tensor")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu")
