"""Seam: the one worker of a server on CPU lives in the engine core's process.

vLLM starts a further process for it, since OpenMP reads which cores it may use when it is loaded.
Here the engine core is started with that told, as vLLM would tell the worker: a process less to
start and to keep, and no queue between planning a step and running it. Workers of several ranks
have processes, as vLLM starts them.

Ranks find each other by a file that torch leaves behind: it lies where the sockets do, in a folder
that its owner removes.
"""

from __future__ import annotations

import functools
import os
import tempfile
from typing import Any
from unittest import mock

from vllm import envs
from vllm.utils.network_utils import get_file_store_init_method
from vllm.utils.ompmultiprocessing import OMPProcessManager
from vllm.v1.engine.utils import CoreEngineProcManager
from vllm.v1.executor import multiproc_executor
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from ouro_runtime.engine.pin import check_parameters

check_parameters(CoreEngineProcManager.__init__, "vllm_config", "executor_class")
check_parameters(OMPProcessManager.configure_omp_envs, "rank", "local_rank")


class OuroCPUExecutor(UniProcExecutor):
    """vLLM's in-process executor, under a name that its CPU platform does not turn into another."""

    def _distributed_args(self) -> tuple[str, int, int]:
        method, *ranks = super()._distributed_args()
        return beside_sockets(method), *ranks


class OuroMultiprocExecutor(MultiprocExecutor):
    """vLLM's executor with a process for each worker."""

    def _init_executor(self) -> None:
        def place() -> str:
            return beside_sockets(get_file_store_init_method())

        with mock.patch.object(multiproc_executor, "get_file_store_init_method", place):
            super()._init_executor()


def beside_sockets(method: str) -> str:
    """The URL of a file in the temporary folder, moved to where vLLM puts its sockets."""
    return method.replace(tempfile.gettempdir(), envs.VLLM_RPC_BASE_PATH, 1)


def choose(parallel: Any) -> None:
    """Run in the engine core's process what vLLM would run in one process beside it."""
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "1") != "1":
        return
    if parallel.distributed_executor_backend == "uni" and parallel.data_parallel_size == 1:
        parallel.distributed_executor_backend = OuroCPUExecutor
    elif parallel.distributed_executor_backend in ("uni", "mp"):
        # The CPU platform would make it `mp`.
        parallel.distributed_executor_backend = OuroMultiprocExecutor


def install() -> None:
    """Let engine cores that hold their worker be started with the worker's cores."""
    init = CoreEngineProcManager.__init__
    if hasattr(init, "__wrapped__"):
        return

    @functools.wraps(init)
    def binding(self: Any, *args: Any, **kwargs: Any) -> None:
        config, executor = kwargs["vllm_config"], kwargs["executor_class"]
        if not issubclass(executor, OuroCPUExecutor):
            return init(self, *args, **kwargs)
        with OMPProcessManager(config).configure_omp_envs(rank=0, local_rank=0):
            return init(self, *args, **kwargs)

    CoreEngineProcManager.__init__ = binding
