"""The CUDA engine on vLLM's own V2 runner, on CPU tensors: what a process needs for that.

vLLM ships its V2 runner for CPU too: `vllm/v1/worker/cpu/model_runner.py` is a subclass of the GPU
one, and `v1/worker/cpu/shm.py` stands in for streams, events and pinned copies. With Triton's
interpreter the kernels of both projects run there as they are. So what is tested is ours and
vLLM's own: runner, request states, block tables, attention metadata, sampler, asynchronous
scheduling. `set_up` makes a process such a bench.

All departures from a GPU, and why:

- `TRITON_INTERPRET=1`: nothing can be compiled. An entry "cpu" in Triton's list of backends:
  without it vLLM's CPU build believes that there is no Triton, and replaces its kernels.
- The interpreter patches Triton's language once, not per call of a function (half of the time), and
  hands kernels their tensors, not copies of the storage below them.
- It makes masks of stores booleans: the grammar kernel's is none there.
- Top-k and top-p by vLLM's plain torch code: the interpreter's loop variables are no tensors.
- Compute capability (9, 0): vLLM's Triton code asks for it.
- vLLM's Triton attention: its other backends are compiled for CUDA, and the CPU's keeps K
  transposed.
- `config_hook` sees CUDA, the model is CUDA's, `attention.ON_CPU` is false: that is the test.
- vLLM's CPU worker around our runner: its GPU worker manages CUDA memory.
- Asynchronous scheduling as it was asked for: vLLM's CPU platform switches it off.
- Blocks of 16 (a GPU's), layout LBHNC (by the hook), eager (no graphs here), float32 (exact
  comparisons).
- The lane kernels' reference code, and vLLM's two attention kernels written out (`attention.py`): a
  kernel costs a hundred times that. Inside `interpreted` they run themselves.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

BLOCK = 16
GOLDEN = Path(__file__).resolve().parent.parent / "golden"
MINI = GOLDEN.parent.parent / "ouro_runtime" / "checkpoints" / "ouro-mini"
CRAMPED: dict[str, Any] = {
    "max_model_len": 96,
    "max_num_seqs": 6,
    "max_num_batched_tokens": 24,
    "enable_prefix_caching": True,
    "num_gpu_blocks_override": 33,
}

ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "t6": (str(GOLDEN / "t6-gqa"), {}),
    "t4": (
        str(GOLDEN / "t4-mha"),
        {
            "skip_tokenizer_init": False,
            "reasoning_parser": "ouro",
            "max_logprobs": -1,
            "enable_prefix_caching": True,
        },
    ),
    "cramped": (str(GOLDEN / "t4-mha"), CRAMPED),
    "mini": (str(MINI), {"max_model_len": 128, "enable_prefix_caching": True}),
}
"""Checkpoint and options of the engines that tests share. t6: six loops, grouped queries. t4: four
loops, a tokenizer whose ids are bytes, a prefix cache. cramped: prompts come in chunks, requests
are preempted. mini: four loops, trained, so that drafts are often right."""


def set_up() -> None:
    """Make this process the bench; once, before Triton or vLLM is imported."""
    early = {"triton", "vllm"} & set(sys.modules)
    assert not early, f"{early} were imported before the bench was set up"
    os.environ["TRITON_INTERPRET"] = "1"
    _set_triton()
    _set_platform()
    _set_attention()
    _register()


def _set_triton() -> None:
    import triton.language as tl
    from triton.backends import Backend, backends
    from triton.runtime import interpreter

    from ouro_kernels import _backend, _interpreter

    backends["cpu"] = Backend(compiler=None, driver=SimpleNamespace(is_active=lambda: True))
    _interpreter.install()
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    kept = SimpleNamespace(restore=lambda: None)
    interpreter._patch_lang = lambda function: kept
    interpreter.GridExecutor._init_args_hst = lambda self, args, kwargs: (args, kwargs)
    interpreter.GridExecutor._restore_args_dev = lambda *args: None
    _backend.interpreting = lambda: False
    store = interpreter.InterpreterBuilder.create_masked_store

    def masked(self: Any, ptrs: Any, value: Any, mask: Any, *args: Any) -> None:
        flags = interpreter.TensorHandle(mask.data.astype(bool), mask.dtype)
        store(self, ptrs, value, flags, *args)

    interpreter.InterpreterBuilder.create_masked_store = masked


def _set_platform() -> None:
    import torch
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    class BenchPlatform(CpuPlatform):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(9, 0)

        @classmethod
        def get_attn_backend_cls(cls, *args: Any, **kwargs: Any) -> str:
            return AttentionBackendEnum.TRITON_ATTN.get_path()

        @classmethod
        def check_and_update_config(cls, vllm_config: Any) -> None:
            asked = vllm_config.scheduler_config.async_scheduling
            super().check_and_update_config(vllm_config)
            vllm_config.scheduler_config.async_scheduling = asked

    vllm.platforms._current_platform = BenchPlatform()
    torch.cuda.get_device_capability = lambda device=None: (9, 0)


def _register() -> None:
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.v1.sample.ops import topk_topp_sampler

    from ouro_runtime import plugin
    from ouro_runtime.engine import config_hook
    from ouro_runtime.model import attention

    topk_topp_sampler.HAS_TRITON = False
    plugin.register()
    ModelRegistry.register_model("OuroForCausalLM", plugin.CUDA_MODEL)
    attention.ON_CPU = False
    config_hook.current_platform = SimpleNamespace(is_cuda=lambda: True, is_cpu=lambda: False)
    config_hook.CUDA_WORKER = "tests.cuda.worker.BenchWorker"


def on(name: str) -> Any:
    """A mark: tests get the engine of this name as `llm`."""
    import pytest

    return pytest.mark.parametrize("llm", [name], indirect=True)


KERNELS: dict[str, Any] = {}
"""vLLM's attention kernels, by the name that its backend calls them by."""


def _set_attention() -> None:
    from vllm.v1.attention.backends import triton_attn

    from tests.cuda import attention

    for name, written_out in (
        ("unified_attention", attention.attend),
        ("triton_reshape_and_cache_flash", attention.write_cache),
    ):
        KERNELS[name] = getattr(triton_attn, name)
        setattr(triton_attn, name, written_out)


@contextmanager
def interpreted() -> Iterator[None]:
    """Inside, every kernel is the GPU's, in Triton's interpreter."""
    from vllm.v1.attention.backends import triton_attn

    from ouro_kernels import _backend

    with (
        mock.patch.object(_backend, "interpreting", return_value=True),
        mock.patch.multiple(triton_attn, **KERNELS),
    ):
        yield


def _check_histories(batch: Any, states: Any) -> None:
    """The host's count of positions is never behind the device's, and the token that a decoding
    request goes on from is the last of its history."""
    slots, computed = batch.idx_mapping, states.num_computed_tokens.gpu[batch.idx_mapping]
    assert (batch.num_computed_tokens_np >= computed.numpy()).all(), "the host's count fell behind"
    decoding = computed >= states.prefill_len.gpu[slots]
    slots, computed = slots[decoding], computed[decoding].long()
    assert (states.total_len.gpu[slots] == computed + 1).all(), "a history has another length"
    heads = batch.input_ids[batch.logits_indices][decoding]
    assert (states.all_token_ids.gpu[slots, computed] == heads).all(), "a history has another end"


@contextmanager
def engine(model: str, **options: Any) -> Iterator[Any]:
    """A small engine, checked as it runs.

    Its K/V cache is full of NaN, so that whoever reads what nobody wrote is found out; in every
    step what host and device remember of each request must agree.
    """
    from tests.engine import harness

    settings = {"block_size": BLOCK, "max_num_seqs": 16, "num_gpu_blocks_override": 1536}
    with harness.engine(model, **(settings | options)) as llm:
        runner = harness.runner_of(llm)
        for cache in runner.kv_caches:
            cache.fill_(float("nan"))
        prepare = runner.prepare_inputs

        def checked(*args: Any) -> Any:
            batch = prepare(*args)
            _check_histories(batch, runner.req_states)
            return batch

        runner.prepare_inputs = checked
        yield llm


def lane_state(llm: Any) -> Any:
    """The `OuroModelState` inside an engine."""
    from tests.engine.harness import runner_of

    return runner_of(llm).model_state


def assert_idle(llm: Any) -> None:
    """Nothing is left of any request: no block, no slot, no count, no memory of a name."""
    from tests.engine.harness import runner_of, scheduler_of

    scheduler, runner = scheduler_of(llm), runner_of(llm)
    core = llm.llm_engine.engine_core.engine_core
    assert not llm.llm_engine.has_unfinished_requests()
    # The runner hears of finished requests with the next step's plan: give it an empty one.
    while core.batch_queue or scheduler.finished_req_ids:
        core.step_fn()
    pool = scheduler.kv_cache_manager.block_pool
    used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
    assert used == 0, f"{used} blocks are still in use"
    for cache in runner.kv_caches:
        assert cache[0].isnan().all(), "the null block was written to"
    requests = runner.model_state.requests
    for left in (
        scheduler.requests,
        scheduler._clean,
        scheduler._deepest,
        scheduler._shared,
        scheduler._filled,
        scheduler._most,
        scheduler._flight,
        scheduler._draftable,
        scheduler.drafts._seats,
        runner.req_states.req_id_to_index,
        requests._slot,
        requests._depths,
        requests._flights,
        requests._epoch,
    ):
        assert not left, left
