"""Golden cases through the CUDA engine on CPU tensors: scheduler, model state, lane step."""

from collections.abc import Sequence

import pytest

from tests.engine.cases import CHECKPOINTS, Case, golden_cases
from tests.engine.compare import assert_case
from tests.gpu.fake_engine import FakeEngine, params


def run(cases: Sequence[Case], **options: object) -> FakeEngine:
    """All cases in one batch, each checked; returns the idle engine."""
    engine = FakeEngine(CHECKPOINTS[cases[0].checkpoint], **options)
    for case in cases:
        engine.add(case.name, case.prompt, params(len(case.tokens), case.depth_fields))
    results = engine.run()
    for case in cases:
        out = results[case.name]
        assert_case(case, out.tokens, out.depths, out.logprobs)
        loops = engine.model.loops
        skips = out.depths[1:] if case.mode == "skip" else [loops] * (len(out.depths) - 1)
        assert out.loops_run == [loops, *skips], case.name
    engine.assert_idle()
    return engine


def some(checkpoint: str, every: int) -> list[Case]:
    """A few cases of every mode, threshold and prompt length."""
    return golden_cases(checkpoint)[::every]


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("in_flight", [1, 2])
def test_everything_in_one_batch(checkpoint: str, in_flight: int) -> None:
    run(golden_cases(checkpoint), in_flight=in_flight)


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_steps_in_flight_change_nothing(in_flight: int) -> None:
    run(some("t6-gqa", 5), in_flight=in_flight)


def test_passes_padded_to_buckets() -> None:
    run(some("t6-gqa", 6), buckets=(1, 2, 4, 8, 16, 32, 64), pad=3)


def test_prompts_in_chunks_beside_decoding_lanes() -> None:
    run(some("t6-gqa", 4), budget=32, slots=8)


def test_without_the_lane_kernels() -> None:
    run(some("t6-gqa", 7), lanes=False)


def test_alone() -> None:
    for case in some("t6-gqa", 9):
        run([case])


def test_a_warm_prefix_cache() -> None:
    cases = [case for case in golden_cases("t6-gqa") if len(case.prompt) == 33][::3]
    engine = FakeEngine(CHECKPOINTS["t6-gqa"], caching=True)
    for turn in range(2):
        for case in cases:
            name = f"{turn}-{case.name}"
            engine.add(name, case.prompt, params(len(case.tokens), case.depth_fields))
        results = engine.run()
        for case in cases:
            out = results[f"{turn}-{case.name}"]
            assert_case(case, out.tokens, out.depths, out.logprobs)
    assert engine.scheduler.kv_cache_manager.prefix_cache_stats is not None
    engine.assert_idle()


@pytest.mark.parametrize("in_flight", [1, 2])
def test_preempted_requests_get_back_the_keys_they_had(in_flight: int) -> None:
    cases = [case for case in golden_cases("t6-gqa") if len(case.prompt) >= 17][::4]
    # Room for about half of the requests at their longest.
    needed = sum(-(-(len(case.prompt) + 24) // 8) for case in cases)
    engine = run(cases, in_flight=in_flight, blocks=needed // 2 + 2, slots=16)
    assert engine.preemptions, "nobody was preempted"
