"""How a server on CPU is put together: one process for engine and worker, quick to start."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch._inductor import config as inductor
from vllm.model_executor.models import registry
from vllm.triton_utils import dispatcher
from vllm.v1.engine.utils import CoreEngineProcManager
from vllm.v1.executor import multiproc_executor
from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from ouro_runtime.engine.cpu import executor as cpu_executor
from ouro_runtime.engine.cpu import kernel_scan
from ouro_runtime.engine.cpu import worker as cpu_worker
from ouro_runtime.engine.cpu.executor import OuroCPUExecutor, OuroMultiprocExecutor
from ouro_runtime.engine.cpu.registry import HereInspected


def parallel(**changes: Any) -> SimpleNamespace:
    default = {"distributed_executor_backend": "uni", "data_parallel_size": 1}
    return SimpleNamespace(**(default | changes))


@pytest.mark.parametrize(
    ("changes", "processes", "chosen"),
    [
        ({}, "1", OuroCPUExecutor),
        ({}, "0", "uni"),
        ({"data_parallel_size": 2}, "1", OuroMultiprocExecutor),
        ({"distributed_executor_backend": "mp"}, "1", OuroMultiprocExecutor),
        ({"distributed_executor_backend": "mp"}, "0", "mp"),
        ({"distributed_executor_backend": "ray"}, "1", "ray"),
    ],
    ids=str,
)
def test_a_single_worker_lives_in_the_engine_core(
    changes: dict[str, Any], processes: str, chosen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", processes)
    config = parallel(**changes)
    cpu_executor.choose(config)
    assert config.distributed_executor_backend == chosen


def test_vllm_takes_the_executor_as_its_own_in_process_one() -> None:
    config = SimpleNamespace(parallel_config=parallel(distributed_executor_backend=OuroCPUExecutor))
    assert Executor.get_class(config) is OuroCPUExecutor
    assert issubclass(OuroCPUExecutor, UniProcExecutor)


def test_the_file_that_ranks_meet_by_lies_beside_the_sockets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", "/run/of/a/server")
    method = cpu_executor.beside_sockets(multiproc_executor.get_file_store_init_method())
    assert method.startswith("file:///run/of/a/server/vllm_dist_")


@pytest.mark.parametrize(("executor", "bound"), [(OuroCPUExecutor, True), (UniProcExecutor, False)])
def test_an_engine_core_that_holds_its_worker_starts_with_the_workers_cores(
    executor: type, bound: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    inside = False

    class Cores:
        def __init__(self, config: Any) -> None:
            assert config == "the configuration"

        @contextmanager
        def configure_omp_envs(self, rank: int, local_rank: int) -> Iterator[None]:
            nonlocal inside
            assert (rank, local_rank) == (0, 0)
            inside = True
            yield
            inside = False

    def init(self: Any, vllm_config: Any, executor_class: type) -> None:
        seen.append(inside)

    monkeypatch.setattr(cpu_executor, "OMPProcessManager", Cores)
    monkeypatch.setattr(CoreEngineProcManager, "__init__", init)
    cpu_executor.install()
    CoreEngineProcManager(vllm_config="the configuration", executor_class=executor)
    assert seen == [bound] and not inside


def test_a_compiled_function_that_is_finished_needs_no_finishing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def finished() -> int:
        return 7

    loaded = SimpleNamespace(_artifacts=SimpleNamespace(compiled_fn=finished))
    monkeypatch.setattr(cpu_worker, "load_compiled", lambda *a, **k: loaded)
    function = cpu_worker.load_finished("file")._artifacts.compiled_fn
    function.finalize_loading(None)
    assert function() == 7


def test_a_compiler_that_knows_less_than_the_processor_is_asked_more_closely(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu_worker, "get_cpp_compiler", lambda: "false")
    assert not cpu_worker.knows_instructions()
    monkeypatch.setattr(cpu_worker, "get_cpp_compiler", lambda: "no-such-compiler")
    assert not cpu_worker.knows_instructions()
    with cpu_worker.quick_compiler():
        assert inductor.cpp.vec_isa_ok is not False, "torch would use no vector instruction at all"
    monkeypatch.setattr(cpu_worker, "get_cpp_compiler", lambda: "true")
    if cpu_worker.platform.machine() == "x86_64":
        assert cpu_worker.knows_instructions()


def test_kernels_are_found_among_modules_that_cannot_be_searched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Opaque:
        __dict__ = 7  # type: ignore[assignment]

    own, foreign, kernel = ModuleType("vllm.own"), ModuleType("foreign"), object()
    own.kernel, foreign.thing, foreign.kernel = kernel, Opaque(), kernel
    monkeypatch.setitem(sys.modules, "vllm.own", own)
    monkeypatch.setitem(sys.modules, "foreign", foreign)
    kernel_scan.install()
    dispatcher._rebind_kernels([(kernel, "override")])
    assert own.kernel == "override" and foreign.kernel is kernel


def test_a_model_is_inspected_without_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(fn: Any) -> Any:
        raise AssertionError("a process was started")

    monkeypatch.setattr(registry, "_run_in_subprocess", started)
    monkeypatch.setattr(HereInspected, "_load_modelinfo_from_cache", lambda self, module_hash: None)
    monkeypatch.setattr(HereInspected, "_save_modelinfo_to_cache", lambda *a, **k: None)
    info = HereInspected("ouro_runtime.model.ouro", "OuroForCausalLM").inspect_model_cls()
    assert info.is_text_generation_model
