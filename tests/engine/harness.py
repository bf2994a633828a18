"""Small float32 engines, in process, and what the tests ask of them."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.outputs import CompletionOutput
from vllm.platforms.cpu import CpuPlatform

from ouro_runtime.engine.pages import pages_held
from ouro_runtime.plugin import register

BLOCK = 32
"""Positions per block: the smallest that vLLM's CPU attention takes."""

Prompt = Sequence[int]


@dataclass(frozen=True)
class Output:
    """One generated sequence; lists have one entry per token.

    Attributes:
        entries: every log-probability of each token's place. prompt_entries: of the prompt's.
    """

    tokens: list[int]
    depths: list[int]
    loops_run: list[int]
    exit_cdf: list[list[float]]
    logprobs: list[float]
    finish_reason: str | None
    stop_reason: int | str | None
    text: str = ""
    drafts: list[int] = field(default_factory=list)
    drafts_dropped: list[int] = field(default_factory=list)
    entries: list[dict[int, float]] = field(default_factory=list)
    prompt_entries: list[dict[int, float]] = field(default_factory=list)

    @classmethod
    def of(cls, completion: CompletionOutput, prompt_logprobs: Any = None) -> Output:
        tokens = list(completion.token_ids)
        depths, loops_run = list(completion.depths), list(completion.loops_run)
        exit_cdf = list(completion.exit_cdf)
        assert completion.finish_reason != "error", "the engine failed this request; see its log"
        assert len(tokens) == len(depths) == len(loops_run), (tokens, depths, loops_run)
        assert [len(cdf) for cdf in exit_cdf] == depths, (exit_cdf, depths)
        logprobs = []
        if completion.logprobs is not None:
            assert len(completion.logprobs) == len(tokens), "log-probabilities misaligned"
            logprobs = [p[t].logprob for p, t in zip(completion.logprobs, tokens, strict=True)]
        return cls(
            tokens,
            depths,
            loops_run,
            exit_cdf,
            logprobs,
            completion.finish_reason,
            completion.stop_reason,
            completion.text,
            list(completion.drafts),
            list(completion.drafts_dropped),
            [values(entry) for entry in completion.logprobs or ()],
            [values(entry or {}) for entry in prompt_logprobs or ()],
        )


def values(entry: Mapping[int, Any]) -> dict[int, float]:
    """Log-probabilities by token."""
    return {token: value.logprob for token, value in entry.items()}


def loops_of(model: str) -> int:
    """T of the checkpoint in a folder."""
    return json.loads((Path(model) / "config.json").read_text())["total_ut_steps"]


def make_engine(model: str, **options: Any) -> LLM:
    """An engine in this process: float32, eager, few small pages, no prefix cache, no tokenizer.

    `options` override vLLM's engine arguments; `blocks` is how many blocks the pool has for
    requests that hold a page of every loop.
    """
    register()
    settings: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "block_size": BLOCK,
        "max_model_len": 256,
        "max_num_seqs": 64,
        "max_logprobs": 20,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "seed": 0,
        # Full-depth requests without drafts, unless a test asks for them.
        "additional_config": {"ouro": {"exit_mode": "skip"}},
    }
    # One page of the pool is nobody's.
    pages = 1 + loops_of(model) * options.pop("blocks", 512)
    llm = LLM(model=str(model), **(settings | {"num_gpu_blocks_override": pages} | options))
    # A process registers its kernels once; a second engine would scan every module again, and
    # trip over modules that other libraries have loaded meanwhile.
    CpuPlatform.register_triton_kernel_overrides = classmethod(lambda cls: None)
    return llm


@contextmanager
def engine(model: str, **options: Any) -> Iterator[LLM]:
    """`make_engine`, shut down at the end so that its memory is given back."""
    llm = make_engine(model, **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def greedy(max_tokens: int, depth: dict[str, Any] | None = None, **options: Any) -> SamplingParams:
    """Greedy sampling parameters without an EOS; `depth` holds the depth controls."""
    settings: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "detokenize": False,
        "logprobs": 1,
        "extra_args": depth,
    }
    return SamplingParams(**(settings | options))


def count_preemptions(llm: LLM) -> list[str]:
    """A list that grows by a request id whenever the scheduler preempts."""
    scheduler, preempted = scheduler_of(llm), []
    preempt = scheduler._preempt_request

    def noting(request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id)
        return preempt(request, *args, **kwargs)

    scheduler._preempt_request = noting
    return preempted


def generate(
    llm: LLM, prompts: Sequence[Prompt], params: Sequence[SamplingParams] | SamplingParams
) -> list[Output]:
    """All prompts in one batch; the first sequence of each."""
    inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    if not isinstance(params, SamplingParams):
        params = list(params)
    answers = llm.generate(inputs, params, use_tqdm=False)
    return [Output.of(answer.outputs[0]) for answer in answers]


def generate_one(llm: LLM, prompt: Prompt, params: SamplingParams) -> Output:
    """One prompt alone."""
    return generate(llm, [prompt], params)[0]


def scheduler_of(llm: LLM) -> Any:
    """The scheduler inside an in-process engine."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def runner_of(llm: LLM) -> Any:
    """The model runner inside an in-process engine."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def pages_by_loop(llm: LLM) -> list[int]:
    """How many pages requests hold, by loop."""
    return pages_held(scheduler_of(llm).kv_cache_manager)


def assert_idle(llm: LLM) -> None:
    """Nothing is left of any request: no page in use, no carried state, no row in the batch."""
    scheduler, runner = scheduler_of(llm), runner_of(llm)
    assert not llm.llm_engine.has_unfinished_requests()
    assert not scheduler.running and not scheduler.waiting and not scheduler.requests
    # The runner hears of finished requests with the next step's plan: give it an empty one.
    llm.llm_engine.engine_core.engine_core.step_fn()
    pool = scheduler.kv_cache_manager.block_pool
    used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
    assert used == 0, f"{used} pages are still in use"
    assert not scheduler._clean, f"clean prefixes of {list(scheduler._clean)} are left"
    assert not scheduler._deepest, f"loops of {list(scheduler._deepest)} are left"
    assert not scheduler._shared, f"modes of {list(scheduler._shared)} are left"
    assert not scheduler._left_at, f"depths of {list(scheduler._left_at)} are left"
    assert scheduler._folder.idle, "folded blocks are left"
    left = set(runner.loop_requests) - set(scheduler.finished_req_ids)
    assert not left, f"the worker still remembers {sorted(left)}"


@dataclass
class Arrival:
    """A request of a workload.

    Attributes:
        name: unique in the workload. step: the engine step before which it arrives.
        abort_after: steps after its arrival at which the client leaves; None: it stays.
    """

    name: str
    prompt: Prompt
    params: SamplingParams
    step: int = 0
    abort_after: int | None = None


def drive(llm: LLM, arrivals: Sequence[Arrival]) -> dict[tuple[str, int], Output]:
    """Run a workload step by step: (name, index among its n) -> the last output seen."""
    waiting = sorted(arrivals, key=lambda arrival: arrival.step)
    leaving: dict[int, list[str]] = {}
    seen: dict[tuple[str, int], Output] = {}
    step = 0
    while waiting or llm.llm_engine.has_unfinished_requests():
        while waiting and waiting[0].step <= step:
            new = waiting.pop(0)
            llm.llm_engine.add_request(
                new.name, {"prompt_token_ids": list(new.prompt)}, new.params.clone()
            )
            if new.abort_after is not None:
                leaving.setdefault(step + new.abort_after, []).append(new.name)
        if gone := leaving.pop(step, None):
            llm.llm_engine.abort_request(gone)
        for answer in llm.llm_engine.step():
            for completion in answer.outputs:
                out = Output.of(completion, answer.prompt_logprobs)
                seen[answer.request_id, completion.index] = out
        step += 1
    return seen
