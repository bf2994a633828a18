"""What ends or bounds a request, against the plain reference; nothing of it is left behind."""

from __future__ import annotations

import random
from functools import partial
from typing import Any
from unittest import mock

import pytest

from tests.cuda import bench
from tests.engine import harness
from tests.engine.cases import CHECKPOINTS
from tests.engine.compare import assert_cdf, assert_same
from tests.engine.harness import Output, generate, runner_of, scheduler_of
from tests.reference.model import Generation, Reference

T = 6
greedy = partial(harness.greedy, logprobs=None)
"""Without log-probabilities every read-out is the captured piece."""
pytestmark = bench.on("t6")


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(CHECKPOINTS["t6-gqa"])


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, 128), k=length)


def same(what: object, out: Output, expected: Generation) -> None:
    margins = [expected.margin(index) for index in range(len(expected.tokens))]
    both = (out.tokens, out.depths, expected.tokens, expected.depths)
    if assert_same(str(what), *both, margins):
        assert_cdf(str(what), out.exit_cdf, expected.exit_cdf)


LIMITS: list[dict[str, Any]] = [
    {"exit_threshold": 0.5, "min_loops": 3},
    {"exit_threshold": 0.9, "max_loops": 2},
    {"exit_threshold": 1.0, "max_loops": 4},
    {"exit_threshold": 0.0, "min_loops": 2, "max_loops": 5},
    {"exit_threshold": 0.0},
    {"exit_threshold": 1.0},
    {"forced_depths": [1]},
    {"forced_depths": [1, 6, 2, 3]},
    {"forced_depths": [2, 3], "exit_mode": "exact"},
    {"exit_threshold": 0.6, "min_loops": 2, "exit_mode": "exact"},
]


def test_limits_thresholds_and_modes_of_one_batch(llm: Any, reference: Reference) -> None:
    numbers = range(len(LIMITS))
    prompts = [prompt(2 + index % 4, index) for index in numbers]
    outputs = generate(llm, prompts, [greedy(8 + index, LIMITS[index]) for index in numbers])
    for index, out in enumerate(outputs):
        wanted = dict(LIMITS[index])
        expected = reference.generate(
            prompts[index],
            8 + index,
            threshold=wanted.pop("exit_threshold", 1.0),
            mode=wanted.pop("exit_mode", "skip"),
            **wanted,
        )
        same(LIMITS[index], out, expected)
    bench.assert_idle(llm)


def test_an_end_in_mid_step(llm: Any, reference: Reference) -> None:
    """A stop token at any place, a length that is no multiple of anything, and nothing after it."""
    depth, ids = {"exit_threshold": 0.3}, prompt(7)
    free = reference.generate(ids, 12, threshold=0.3, mode="skip")
    assert min(free.depths) < T
    stops = list(dict.fromkeys(free.tokens))[:4]
    params = [greedy(12, depth, stop_token_ids=[stop]) for stop in stops]
    params += [greedy(limit, depth) for limit in (1, 2, 3, 7)]
    ends = [free.tokens.index(stop) + 1 for stop in stops] + [1, 2, 3, 7]
    for end, out in zip(ends, generate(llm, [ids] * len(ends), params), strict=True):
        assert_same(f"end at {end}", out.tokens, out.depths, free.tokens[:end], free.depths[:end])
    bench.assert_idle(llm)


def test_an_abort_in_mid_token_leaves_nothing_behind(llm: Any, reference: Reference) -> None:
    depth, stays = {"exit_threshold": 0.5}, {}
    names = [
        llm.llm_engine.add_request(
            str(index), {"prompt_token_ids": prompt(4, index)}, greedy(14, depth)
        )
        for index in range(4)
    ]
    carried = bench.lane_state(llm).buffers.carried_loop
    for step in range(60):
        if step == 4:
            assert int(carried.max()) > 0, "nobody is in the middle of a token"
            llm.llm_engine.abort_request(["1"])
            # As in a server: the engine hears of it while the next step runs.
            gone = llm.llm_engine.output_processor.abort_requests(["2"], False)
            llm.llm_engine.engine_core.engine_core.aborts_queue.put_nowait(gone)
        for answer in llm.llm_engine.step():
            if answer.finished:
                stays[answer.request_id] = Output.of(answer.outputs[0])
    assert sorted(stays) == ["0", "3"], names
    for name, out in stays.items():
        ids = prompt(4, int(name))
        same(name, out, reference.generate(ids, 14, threshold=0.5, mode="skip"))
    bench.assert_idle(llm)


def test_counts_between_steps(llm: Any) -> None:
    """Placeholders are what steps in flight can still bring, and never pass the length limit."""
    scheduler = scheduler_of(llm)
    for index, threshold in enumerate((0.1, 0.4, 1.0)):
        params = greedy(9, {"exit_threshold": threshold})
        llm.llm_engine.add_request(str(index), {"prompt_token_ids": prompt(6, index)}, params)
    flying = 0
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        for request in scheduler.running:
            most = request.num_output_placeholders
            flight = scheduler._flight[request.request_id]
            flying = max(flying, len(flight))
            assert 0 <= most <= sum(flight)
            assert request.num_computed_tokens == request.num_tokens - 1 + most
            assert request.num_computed_tokens < request.num_prompt_tokens + request.max_tokens
    assert flying, "nothing was scheduled ahead"
    bench.assert_idle(llm)


def test_only_lanes_that_may_leave_are_sampled(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of logits per token at full depth, and none of a pass where nobody can leave."""
    sampler, rows = runner_of(llm).model_state.sampler, []
    inner = type(sampler).__call__

    def counting(self: Any, logits: Any, batch: Any) -> Any:
        rows.append(len(logits))
        return inner(self, logits, batch)

    monkeypatch.setattr(type(sampler), "__call__", counting)
    generate(llm, [prompt(4, seed) for seed in range(3)], greedy(6, {"exit_threshold": 1.0}))
    # A step per token, and one that was under way when the last came back.
    assert set(rows) == {3} and len(rows) <= 6 + 1
    bench.assert_idle(llm)


def test_cells_are_counted_as_they_ran(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    depths, reports = [2, 3, 1, 6], []
    note = bench.lane_state(llm).note

    def noting(bill: Any, output: Any, tokens: Any) -> None:
        reports.append(output.report)
        note(bill, output, tokens)

    monkeypatch.setattr(bench.lane_state(llm), "note", noting)
    (out,) = generate(llm, [prompt(5)], [greedy(9, {"forced_depths": depths})])
    assert out.depths == [depths[i % 4] for i in range(9)]
    cells = [sum(report.rows_by_loop[loop] for report in reports) for loop in range(T)]
    ran = [T] * 5 + out.depths[1:]
    assert cells == [sum(depth > loop for depth in ran) for loop in range(T)]
    assert sum(report.tokens for report in reports) == 9


def test_a_step_brings_nothing_after_a_token_that_ends_the_request(llm: Any) -> None:
    """The scheduler would drop it; the device need not make it."""
    state = bench.lane_state(llm)
    depth = {"forced_depths": [1]}
    (free,) = generate(llm, [prompt(4)], [greedy(30, depth)])
    stop = free.tokens[9]
    brought: list[list[int]] = []
    done = state.step_done

    def noting(logits: Any) -> Any:
        output = done(logits)
        if output is not None:
            tokens, count = output[0].sampled_token_ids, output[0].num_sampled
            brought.append(tokens[0, : int(count[0])].tolist())
            assert not tokens[0, int(count[0]) :].any()
        return output

    with mock.patch.object(state, "step_done", noting):
        (out,) = generate(llm, [prompt(4)], [greedy(30, depth, stop_token_ids=[stop])])
    assert out.tokens == free.tokens[: free.tokens.index(stop) + 1]
    (ended,) = [tokens for tokens in brought if stop in tokens][:1]
    assert 1 < len(ended) < T and ended.index(stop) == len(ended) - 1
