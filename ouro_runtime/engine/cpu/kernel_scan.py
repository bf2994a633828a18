"""Seam: vLLM looks for its Triton kernels among its own modules only.

On CPU vLLM 0.32 puts C++ functions in the place of some kernels, wherever a module refers to one.
It looks into every module of the process, and raises on some that are not its own (llvmlite's,
which numba brings).
"""

from __future__ import annotations

import functools
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

from vllm.triton_utils import dispatcher

from ouro_runtime.engine.pin import check_parameters

check_parameters(dispatcher._rebind_kernels, "overrides")


def install() -> None:
    """Narrow the search, once per process."""
    rebind = dispatcher._rebind_kernels
    if hasattr(rebind, "__wrapped__"):
        return

    @functools.wraps(rebind)
    def among_vllms(overrides: Any) -> None:
        own = {n: m for n, m in sys.modules.items() if n.partition(".")[0] == "vllm"}
        with mock.patch.object(dispatcher, "sys", SimpleNamespace(modules=own)):
            rebind(overrides)

    dispatcher._rebind_kernels = among_vllms
