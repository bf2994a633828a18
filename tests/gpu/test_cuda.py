"""On a GPU: the same golden data through vLLM's real runner. Not run anywhere else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.engine.cases import CHECKPOINTS, Case, golden_cases
from tests.engine.compare import first_difference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SAFE = 5e-3
"""Margin over which no order of float32 summation, nor a TF32 product, may flip a decision."""

OPTIONS: dict[str, dict[str, Any]] = {
    "graphs": {},
    "eager": {"enforce_eager": True},
    "synchronous": {"async_scheduling": False},
    "chunks": {"max_num_batched_tokens": 64, "max_num_seqs": 32},
}

ENGINES = [*(("t4-mha", options) for options in OPTIONS), ("t6-gqa", "graphs")]
"""As many engines as start in a few minutes."""


@pytest.fixture(scope="module", params=ENGINES)
def run(request: pytest.FixtureRequest) -> Iterator[tuple[str, Any]]:
    from tests.engine.harness import engine

    checkpoint, options = request.param
    settings = {
        "enforce_eager": False,
        "num_gpu_blocks_override": 1024,
        "block_size": 16,
        "gpu_memory_utilization": 0.05,
        "kv_cache_memory_bytes": 1 << 30,
    }
    with engine(CHECKPOINTS[checkpoint], **(settings | OPTIONS[options])) as llm:
        yield checkpoint, llm


def check(case: Case, tokens: list[int], depths: list[int]) -> None:
    if case.margin < SAFE:
        return
    at = first_difference(tokens, depths, case.tokens, case.depths)
    assert at is None, f"{case.name}: token {at}: {tokens} at {depths}, expected {case.tokens}"


def test_golden_cases_in_one_batch(run: tuple[str, Any]) -> None:
    from tests.engine.harness import generate, greedy

    checkpoint, llm = run
    cases = golden_cases(checkpoint)
    outputs = generate(
        llm,
        [case.prompt for case in cases],
        [greedy(len(case.tokens), case.depth_fields) for case in cases],
    )
    for case, out in zip(cases, outputs, strict=True):
        check(case, out.tokens, out.depths)


def test_golden_cases_alone(run: tuple[str, Any]) -> None:
    from tests.engine.harness import generate_one, greedy

    checkpoint, llm = run
    for case in golden_cases(checkpoint)[::7]:
        out = generate_one(llm, case.prompt, greedy(len(case.tokens), case.depth_fields))
        check(case, out.tokens, out.depths)


def test_forced_depths_come_out(run: tuple[str, Any]) -> None:
    from tests.engine.harness import generate, greedy

    _, llm = run
    loops = llm.llm_engine.vllm_config.model_config.hf_config.total_ut_steps
    wanted = [[1], [loops], [1, 2, 3], [loops, 1]]
    outputs = generate(
        llm,
        [[5, 6, 7 + index] for index in range(len(wanted))],
        [greedy(17, {"forced_depths": depths}) for depths in wanted],
    )
    for depths, out in zip(wanted, outputs, strict=True):
        assert out.depths == [depths[i % len(depths)] for i in range(17)]


@pytest.mark.parametrize("logprobs", [None, 1], ids=["pieces", "sampler"])
def test_lossless_is_the_answer_of_every_loop(run: tuple[str, Any], logprobs: int | None) -> None:
    """Beside requests that skip; drafted at several thresholds, and where the rule says."""
    from tests.engine.harness import generate, greedy

    checkpoint, llm = run
    loops = llm.llm_engine.vllm_config.model_config.hf_config.total_ut_steps
    full, skip = golden_cases(checkpoint, ("full",)), golden_cases(checkpoint, ("skip",))[::5]
    ways: list[dict[str, Any]] = [{}, *({"exit_threshold": q} for q in (0.0, 0.2, 0.5))]
    drafted = [(case, {"exit_mode": "lossless", **way}) for case in full for way in ways]
    asked = [*drafted, *((case, case.depth_fields) for case in skip)]
    for start in range(0, len(asked), 8):
        part = asked[start : start + 8]
        outputs = generate(
            llm,
            [case.prompt for case, _ in part],
            [greedy(len(case.tokens), depth, logprobs=logprobs) for case, depth in part],
        )
        for (case, depth), out in zip(part, outputs, strict=True):
            if case.mode == "skip":
                check(case, out.tokens, out.depths)
                continue
            check(case, out.tokens, list(case.depths))
            assert min(out.loops_run) >= loops
            assert depth.get("exit_threshold") != 0.0 or any(out.drafts[1:-1])
            known = zip(out.depths, out.drafts, strict=True)
            assert all(loop in (draft, loops) for loop, draft in known)


def test_seeds_penalties_and_stops(run: tuple[str, Any]) -> None:
    from tests.engine.harness import generate, greedy

    _, llm = run
    depth = {"exit_threshold": 0.4}
    params = [
        greedy(20, depth, temperature=1.0, seed=3),
        greedy(20, depth, presence_penalty=1.5, frequency_penalty=0.5),
        greedy(20, depth, temperature=0.8, top_p=0.9, top_k=20, seed=4, min_tokens=5),
    ]
    prompts = [[9, 8, 7]] * len(params)
    together = generate(llm, prompts, params)
    alone = [generate(llm, [p], [s])[0] for p, s in zip(prompts, params, strict=True)]
    assert [out.tokens for out in together] == [out.tokens for out in alone]
    stop = together[0].tokens[6]
    cut = generate(llm, prompts[:1], [params[0].clone()])[0]
    assert cut.tokens == together[0].tokens
    params[0].stop_token_ids = [stop]
    ended = generate(llm, prompts[:1], [params[0]])[0]
    assert ended.tokens == together[0].tokens[: together[0].tokens.index(stop) + 1]
