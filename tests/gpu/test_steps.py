"""What requests may ask for, on the CUDA engine with CPU tensors, against the plain reference."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from vllm.sampling_params import StructuredOutputsParams

from tests.engine.cases import CHECKPOINTS, NEAR
from tests.engine.compare import assert_cdf
from tests.gpu.fake_engine import FakeEngine, Result, params
from tests.reference.model import Generation, Reference

FOLDER = CHECKPOINTS["t6-gqa"]
T = 6


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(FOLDER)


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, 128), k=length)


def assert_same(out: Result, expected: Generation, what: object) -> None:
    """Tokens, depths and exit CDFs agree, up to the first near tie."""
    for index, (token, depth) in enumerate(zip(expected.tokens, expected.depths, strict=True)):
        if expected.margin(index) < NEAR:
            return
        assert index < len(out.tokens), f"{what}: {len(out.tokens)} tokens, {expected.tokens}"
        got = out.tokens[index], out.depths[index]
        assert got == (token, depth), f"{what}: token {index}: {got}, expected {(token, depth)}"
        assert_cdf(str(what), [out.exit_cdf[index]], [expected.exit_cdf[index]])
    assert len(out.tokens) == len(expected.tokens), what


LIMITS: list[dict[str, Any]] = [
    {"exit_threshold": 0.5, "min_loops": 3},
    {"exit_threshold": 0.9, "max_loops": 2},
    {"exit_threshold": 1.0, "max_loops": 4},
    {"exit_threshold": 0.0, "min_loops": 2, "max_loops": 5},
    {"exit_threshold": 0.0},
    {"forced_depths": [1]},
    {"forced_depths": [1, 6, 2, 3]},
    {"forced_depths": [2, 3], "exit_mode": "exact"},
    {"exit_threshold": 0.6, "min_loops": 2, "exit_mode": "exact"},
]


@pytest.mark.parametrize("options", [{}, {"in_flight": 1, "budget": 16, "slots": 16, "pad": 2}])
def test_limits_of_different_requests_in_one_batch(
    reference: Reference, options: dict[str, Any]
) -> None:
    engine = FakeEngine(FOLDER, **options)
    for index, depth in enumerate(LIMITS):
        engine.add(str(index), prompt(5 + index, index), params(15 + index, depth))
    results = engine.run()
    for index, depth in enumerate(LIMITS):
        wanted = dict(depth)
        mode = wanted.pop("exit_mode", "skip")
        threshold = wanted.pop("exit_threshold", 1.0)
        expected = reference.generate(
            prompt(5 + index, index), 15 + index, threshold=threshold, mode=mode, **wanted
        )
        assert_same(results[str(index)], expected, depth)
    engine.assert_idle()


def test_a_stop_token_in_mid_step_ends_the_request(reference: Reference) -> None:
    engine = FakeEngine(FOLDER)
    expected = {}
    for seed in range(6):
        ids = prompt(7, seed)
        full = reference.generate(ids, 20, threshold=0.3, mode="skip")
        stop = full.tokens[4 + seed]
        expected[str(seed)] = reference.generate(
            ids, 20, threshold=0.3, mode="skip", stop=frozenset({stop})
        )
        depth = {"exit_threshold": 0.3}
        engine.add(str(seed), ids, params(20, depth, stop_token_ids=[stop]))
    for name, out in engine.run().items():
        assert_same(out, expected[name], name)
    engine.assert_idle()


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 7])
def test_no_token_past_max_tokens(reference: Reference, max_tokens: int) -> None:
    engine = FakeEngine(FOLDER)
    engine.add("a", prompt(9), params(max_tokens, {"exit_threshold": 0.1}))
    engine.add("b", prompt(8), params(12, {"exit_threshold": 0.1}))
    out = engine.run()["a"]
    assert_same(out, reference.generate(prompt(9), max_tokens, threshold=0.1, mode="skip"), "a")
    engine.assert_idle()


def test_no_token_past_the_longest_sequence(reference: Reference) -> None:
    engine = FakeEngine(FOLDER, max_len=40)
    engine.add("a", prompt(20), params(20, {"exit_threshold": 0.2}))
    out = engine.run()["a"]
    assert_same(out, reference.generate(prompt(20), 20, threshold=0.2, mode="skip"), "a")
    assert len(out.tokens) == 20
    engine.assert_idle()


def test_tokens_depend_on_the_tokens_of_the_same_step(reference: Reference) -> None:
    def unused(logits: torch.Tensor, output: list[int]) -> int:
        logits = logits.clone()
        logits[output] = -torch.inf
        return int(logits.argmax())

    engine = FakeEngine(FOLDER)
    for seed in range(3):
        depth = {"exit_threshold": 0.3}
        engine.add(str(seed), prompt(6, seed), params(20, depth, presence_penalty=1.0))
    engine.add("plain", prompt(6, 9), params(20, {"exit_threshold": 0.3}))
    results = engine.run()
    for seed in range(3):
        expected = reference.generate(
            prompt(6, seed), 20, threshold=0.3, mode="skip", choose=unused
        )
        assert_same(results[str(seed)], expected, seed)
    counts = engine.runner.inner.penalties_state.output_bin_counts
    assert int(counts.max()) <= 20


def test_seeded_requests_do_not_depend_on_their_neighbours() -> None:
    def sample(count: int, **options: Any) -> list[Result]:
        engine = FakeEngine(FOLDER, **options)
        for index in range(count):
            depth = {"exit_threshold": (0.3, 0.6, 1.0)[index % 3]}
            engine.add(str(index), prompt(6, index), params(16, depth, seed=index))
        return [engine.run()[str(index)] for index in range(count)]

    together = sample(6)
    for index, alone in enumerate(sample(2, in_flight=1, buckets=(1, 2, 4, 8))):
        assert (alone.tokens, alone.depths) == (together[index].tokens, together[index].depths)


def test_a_request_that_needs_the_host_gets_one_token_a_step(reference: Reference) -> None:
    engine = FakeEngine(FOLDER)
    single = params(12, {"exit_threshold": 0.3}, thinking_token_budget=1000)
    engine.add("host", prompt(6), single)
    engine.add("free", prompt(7), params(30, {"exit_threshold": 0.1}))
    results = engine.run()
    expected = reference.generate(prompt(6), 12, threshold=0.3, mode="skip")
    assert_same(results["host"], expected, "host")
    assert_same(
        results["free"], reference.generate(prompt(7), 30, threshold=0.1, mode="skip"), "free"
    )
    engine.assert_idle()


def test_a_grammar_makes_a_request_single() -> None:
    engine = FakeEngine(FOLDER)
    grammar = params(4, structured_outputs=StructuredOutputsParams(json={"type": "object"}))
    engine.state.requests.add(3, "g", grammar, 5, 5)
    assert engine.state.requests.book.single[3]


def test_an_abort_in_mid_step_leaves_nothing_behind() -> None:
    from vllm.v1.request import RequestStatus

    engine = FakeEngine(FOLDER)
    for index in range(4):
        engine.add(str(index), prompt(6, index), params(30, {"exit_threshold": 0.5}))
    for _ in range(4):
        engine.step()
    engine.scheduler.finish_requests(["1", "2"], RequestStatus.FINISHED_ABORTED)
    engine.add("5", prompt(6, 5), params(10, {"exit_threshold": 0.2}))
    engine.run()
    assert len(engine.results["0"].tokens) == 30
    assert len(engine.results["5"].tokens) == 10
    engine.assert_idle()


def test_lanes_that_cannot_leave_are_not_sampled() -> None:
    engine = FakeEngine(FOLDER)
    for index in range(4):
        engine.add(str(index), prompt(6, index), params(10))
    engine.run()
    # One row per token, and a discarded step or two at the end of each request.
    assert engine.runner.inner.rows <= 4 * (10 + 2)


def test_cells_are_counted_as_they_ran() -> None:
    engine = FakeEngine(FOLDER, in_flight=1)
    depths = [2, 3, 1, 6]
    engine.add("a", prompt(5), params(9, {"forced_depths": depths}))
    out = engine.run()["a"]
    assert out.depths == [depths[i % 4] for i in range(9)]
    cells = torch.tensor([report.rows_by_loop for report in engine.reports]).sum(0)
    ran = [T] * 5 + out.depths[1:]
    assert cells.tolist() == [sum(depth > loop for depth in ran) for loop in range(T)]
    assert sum(report.tokens for report in engine.reports) == 9
