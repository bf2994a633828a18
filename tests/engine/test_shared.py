"""`exit_mode: "shared"`: one plane of K/V once the prompt is complete."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
from vllm import LLM

from ouro_runtime.config import DepthError
from tests.engine.cases import CHECKPOINTS, MODES, golden_cases
from tests.engine.compare import assert_case, assert_same
from tests.engine.harness import (
    BLOCK,
    Output,
    assert_idle,
    count_preemptions,
    engine,
    generate,
    greedy,
    pages_by_loop,
    scheduler_of,
)
from tests.reference.model import Reference

CHECKPOINT, LOOPS = CHECKPOINTS["t4-mha"], 4
SHARED = {"exit_mode": "shared", "exit_threshold": 0.4}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """Prompts in chunks, a cache, and so few pages that somebody is preempted in a crowd."""
    options = {
        "enable_prefix_caching": True,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 24,
        "blocks": 12,
    }
    with engine(CHECKPOINT, **options) as llm:
        yield llm


@pytest.fixture(autouse=True)
def cold(llm: LLM) -> Iterator[None]:
    """Every test starts with an empty cache, and leaves nothing behind."""
    assert llm.reset_prefix_cache()
    yield
    assert_idle(llm)


def random_tokens(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(count)]


def test_golden_cases_among_other_modes_preempted_and_cached(llm: LLM) -> None:
    preempted = count_preemptions(llm)
    cases = [c for c in golden_cases("t4-mha", MODES) if len(c.prompt) > 1]
    for _ in range(2):
        outputs = generate(
            llm,
            [case.prompt for case in cases],
            [greedy(len(case.tokens), case.depth_fields) for case in cases],
        )
        for case, out in zip(cases, outputs, strict=True):
            assert_case(case, out.tokens, out.depths, out.logprobs)
    assert len(preempted) >= 5


def test_preempted_by_its_like_it_answers_as_alone(llm: LLM) -> None:
    """What it had generated is computed again over its prompt's last loop, each position after
    those before it; only those that left at loop 1 are there in the same pass."""
    preempted = count_preemptions(llm)
    split = scheduler_of(llm)._mamba_block_aligned_split
    chunks: list[int] = []

    def noting(request: Any, *args: Any) -> int:
        count = split(request, *args)
        if request.num_computed_tokens >= request.num_prompt_tokens:
            chunks.append(count)
        return count

    reference = Reference(CHECKPOINT)
    prompts = [random_tokens(seed, 10 + 7 * (seed % 5)) for seed in range(22)]
    depths = [SHARED | {"max_loops": 2 + seed % 3} for seed in range(22)]
    with mock.patch.object(scheduler_of(llm), "_mamba_block_aligned_split", noting):
        outputs = generate(llm, prompts, [greedy(80, depth) for depth in depths])
    assert len(set(preempted)) >= 3 and max(chunks) > 1
    for prompt, depth, out in zip(prompts, depths, outputs, strict=True):
        wanted = reference.generate(
            prompt, 80, threshold=0.4, mode="shared", max_loops=depth["max_loops"]
        )
        margins = [wanted.margin(index) for index in range(80)]
        both = (out.tokens, out.depths, wanted.tokens, wanted.depths)
        assert_same(f"{len(prompt)} {depth}", *both, margins)
        assert out.loops_run == [LOOPS, *out.depths[1:]]


def test_only_the_last_loops_pages_stay_and_the_cache_keeps_the_others(llm: LLM) -> None:
    prompt = random_tokens(1, 3 * BLOCK + 5)
    llm.llm_engine.add_request("held", {"prompt_token_ids": prompt}, greedy(40, SHARED))
    (request,) = scheduler_of(llm).requests.values()
    seen: list[list[int]] = []
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        if request.num_computed_tokens < len(prompt):
            assert len(set(pages_by_loop(llm))) == 1
        else:
            seen.append(pages_by_loop(llm))
    assert all(pages[:-1] == [0] * (LOOPS - 1) for pages in seen)
    assert max(pages[-1] for pages in seen) == 5
    for depth in (SHARED, {"exit_threshold": 1.0}, {"max_loops": 1}):
        answer = llm.generate({"prompt_token_ids": prompt}, greedy(8, depth), use_tqdm=False)[0]
        assert answer.num_cached_tokens == 3 * BLOCK
        out = Output.of(answer.outputs[0])
        wanted = Reference(CHECKPOINT).generate(
            prompt,
            8,
            threshold=depth.get("exit_threshold", 1.0),
            mode=depth.get("exit_mode", "skip"),
            max_loops=depth.get("max_loops"),
        )
        assert_same(f"{depth}", out.tokens, out.depths, wanted.tokens, wanted.depths)


def test_what_was_generated_is_never_shared(llm: LLM) -> None:
    prompt = random_tokens(2, BLOCK + 3)
    (first,) = generate(llm, [prompt], greedy(70, SHARED))
    chat = {"prompt_token_ids": prompt + first.tokens}
    for depth in (SHARED, {"max_loops": 1}):
        answer = llm.generate(chat, greedy(2, depth), use_tqdm=False)[0]
        assert answer.num_cached_tokens == BLOCK, depth
        assert llm.reset_prefix_cache()
        generate(llm, [prompt], greedy(70, SHARED))


@pytest.mark.parametrize("mode", ["shared,exact", ["shared", "lossless"], "lossless-shared"])
def test_no_request_is_of_two_modes(llm: LLM, mode: Any) -> None:
    with pytest.raises(DepthError, match="exit_mode must be one of") as caught:
        generate(llm, [[1, 2]], greedy(2, {"exit_mode": mode}))
    assert caught.value.param == "exit_mode"
