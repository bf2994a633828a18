"""What the released code generated: tokens, depths, log-probabilities, loops run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest

from tests.cuda import bench
from tests.engine.cases import CHECKPOINTS, Case, golden_cases
from tests.engine.compare import assert_case
from tests.engine.harness import Output, generate, generate_one, greedy

T = {"t4-mha": 4, "t6-gqa": 6}


def check(case: Case, out: Output) -> None:
    assert_case(case, out.tokens, out.depths, out.logprobs)
    loops = T[case.checkpoint]
    later = out.depths[1:] if case.mode == "skip" else [loops] * (len(out.depths) - 1)
    assert out.loops_run == [loops, *later], case.name


def run(llm: Any, cases: Sequence[Case]) -> None:
    """All in one batch, and an idle engine after it."""
    params = [greedy(len(case.tokens), case.depth_fields) for case in cases]
    for case, out in zip(cases, generate(llm, [c.prompt for c in cases], params), strict=True):
        check(case, out)
    bench.assert_idle(llm)


def some(checkpoint: str, every: int, longest: int = 17) -> list[Case]:
    """Cases of every mode."""
    cases = [case for case in golden_cases(checkpoint) if len(case.prompt) <= longest][::every]
    assert {case.mode for case in cases} == {"full", "exact", "skip"}
    return cases


@bench.on("t6")
def test_six_loops_in_one_batch(llm: Any) -> None:
    run(llm, some("t6-gqa", 3))


@bench.on("t4")
def test_four_loops_in_one_batch(llm: Any) -> None:
    run(llm, some("t4-mha", 3))


@bench.on("t6")
def test_alone_and_one_step_at_a_time(llm: Any) -> None:
    """Synchronous scheduling is the same scheduler without a step in flight."""
    core = llm.llm_engine.engine_core.engine_core
    with mock.patch.multiple(core, batch_queue=None, step_fn=core.step):
        for case in some("t6-gqa", 8, longest=5):
            out = generate_one(llm, case.prompt, greedy(len(case.tokens), case.depth_fields))
            check(case, out)


@bench.on("t6")
def test_passes_padded_to_buckets(llm: Any) -> None:
    with mock.patch.object(bench.lane_state(llm).graphs, "buckets", (2, 4, 8, 16)):
        run(llm, some("t6-gqa", 7, longest=5))


@bench.on("t6")
def test_without_the_lane_kernels(llm: Any) -> None:
    """Decode batches through vLLM's attention, stand-ins filled after an exit."""
    cases = {case.mode: case for case in some("t6-gqa", 1, longest=5) if case.threshold >= 0.5}
    with mock.patch.object(bench.lane_state(llm).engine, "parts", None):
        outputs = generate(
            llm,
            [case.prompt for case in cases.values()],
            [greedy(6, case.depth_fields) for case in cases.values()],
        )
    for case, out in zip(cases.values(), outputs, strict=True):
        assert (out.tokens, out.depths) == (list(case.tokens[:6]), list(case.depths[:6])), case.name


@bench.on("t6")
def test_the_lane_kernels_in_tritons_interpreter(llm: Any) -> None:
    cases = {case.mode: case for case in some("t6-gqa", 1, longest=5) if case.threshold >= 0.5}
    with bench.interpreted():
        outputs = generate(
            llm,
            [case.prompt for case in cases.values()],
            [greedy(5, case.depth_fields) for case in cases.values()],
        )
    for case, out in zip(cases.values(), outputs, strict=True):
        assert (out.tokens, out.depths) == (list(case.tokens[:5]), list(case.depths[:5])), case.name


@pytest.mark.long
@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_every_case(checkpoint: str, asynchronous: bool) -> None:
    options = {"max_num_seqs": 64, "async_scheduling": asynchronous}
    with bench.engine(CHECKPOINTS[checkpoint], **options) as llm:
        assert (llm.llm_engine.engine_core.engine_core.batch_queue is not None) == asynchronous
        run(llm, golden_cases(checkpoint))


@pytest.mark.long
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_every_case_with_the_lane_kernels(checkpoint: str) -> None:
    with bench.engine(CHECKPOINTS[checkpoint], max_num_seqs=64) as llm, bench.interpreted():
        run(llm, golden_cases(checkpoint)[::5])
