"""Every golden case through the engine, in float32: tokens, depths and log-probabilities."""

from collections.abc import Iterator
from math import prod

import pytest
from vllm import LLM

from tests.engine.cases import CHECKPOINTS, MODES, Case, golden_cases, golden_records
from tests.engine.compare import assert_case, assert_cdf
from tests.engine.harness import (
    Output,
    assert_idle,
    engine,
    generate,
    generate_one,
    greedy,
    scheduler_of,
)


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def plain(checkpoint: str) -> Iterator[LLM]:
    with engine(CHECKPOINTS[checkpoint]) as llm:
        yield llm


def run_batch(llm: LLM, cases: list[Case]) -> list[Output]:
    return generate(
        llm,
        [case.prompt for case in cases],
        [greedy(len(case.tokens), case.depth_fields) for case in cases],
    )


def check(cases: list[Case], outputs: list[Output]) -> None:
    for case, out in zip(cases, outputs, strict=True):
        assert_case(case, out.tokens, out.depths, out.logprobs)


@pytest.mark.parametrize("mode", MODES)
def test_alone(checkpoint: str, plain: LLM, mode: str) -> None:
    for case in golden_cases(checkpoint, (mode,)):
        out = generate_one(plain, case.prompt, greedy(len(case.tokens), case.depth_fields))
        assert_case(case, out.tokens, out.depths, out.logprobs)
    assert_idle(plain)


def test_everything_in_one_batch(checkpoint: str, plain: LLM) -> None:
    cases = golden_cases(checkpoint, MODES)
    check(cases, run_batch(plain, cases))
    assert_idle(plain)


def test_loops_run_count_what_was_executed(checkpoint: str, plain: LLM) -> None:
    cases = golden_cases(checkpoint, MODES)
    for case, out in zip(cases, run_batch(plain, cases), strict=True):
        loops = max(golden_cases(checkpoint, ("full",))[0].depths)
        expected = [loops, *(out.depths[1:] if case.mode in ("skip", "shared") else [loops] * 23)]
        assert out.loops_run == expected, case.name


def test_the_first_tokens_exit_cdf_is_the_released_gates(checkpoint: str, plain: LLM) -> None:
    cases = golden_cases(checkpoint, MODES)
    gates = {
        tuple(record["prompt"]): record["last_position"]["lambda_by_loop"]
        for record in golden_records(checkpoint)
    }
    for case, out in zip(cases, run_batch(plain, cases), strict=True):
        halt = gates[case.prompt]
        cdf = [1 - prod(1 - gate for gate in halt[: n + 1]) for n in range(len(halt) - 1)] + [1.0]
        assert_cdf(case.name, out.exit_cdf[:1], [cdf[: case.depths[0]]])


def test_chunked_prefill(checkpoint: str) -> None:
    cases = golden_cases(checkpoint, MODES)
    with engine(CHECKPOINTS[checkpoint], max_num_batched_tokens=32, max_num_seqs=16) as llm:
        check(cases, run_batch(llm, cases))
        assert_idle(llm)


def test_warm_prefix_cache(checkpoint: str) -> None:
    cases = golden_cases(checkpoint, MODES)
    with engine(CHECKPOINTS[checkpoint], enable_prefix_caching=True) as llm:
        check(cases, run_batch(llm, cases))
        warm = run_batch(llm, cases)
        check(cases, warm)
        long = max(cases, key=lambda case: len(case.prompt))
        answer = llm.generate(
            {"prompt_token_ids": list(long.prompt)},
            greedy(len(long.tokens), long.depth_fields),
            use_tqdm=False,
        )[0]
        assert answer.num_cached_tokens, "the cache was cold"
        check([long], [Output.of(answer.outputs[0])])
        assert scheduler_of(llm).kv_cache_manager.enable_caching
