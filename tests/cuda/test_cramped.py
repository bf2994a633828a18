"""Prompts in chunks, preemption, prefix cache: none of it shows in an answer."""

from __future__ import annotations

import random
from typing import Any
from unittest import mock

import pytest

from tests.cuda import bench
from tests.engine.cases import CHECKPOINTS, golden_cases
from tests.engine.compare import LOGPROB_TOLERANCE, assert_case, assert_same
from tests.engine.harness import (
    Arrival,
    Output,
    drive,
    generate,
    generate_one,
    greedy,
    scheduler_of,
)
from tests.reference.model import Reference

FULL = {"exit_threshold": 1.0}


def watch(llm: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts chunks that end before their prompt, and preemptions."""
    scheduler, seen = scheduler_of(llm), {"chunks": 0, "preempted": 0}
    schedule = scheduler.schedule

    def noting(*args: Any, **kwargs: Any) -> Any:
        plan = schedule(*args, **kwargs)
        for name, count in plan.num_scheduled_tokens.items():
            request = scheduler.requests[name]
            seen["chunks"] += count > 1 and request.is_prefill_chunk
        seen["preempted"] += len(plan.preempted_req_ids or ())
        return plan

    monkeypatch.setattr(scheduler, "schedule", noting)
    return seen


def run_golden(llm: Any, every: int) -> None:
    cases = [case for case in golden_cases("t4-mha") if len(case.prompt) in (17, 33)][::every]
    assert {case.mode for case in cases} == {"full", "exact", "skip"}
    params = [greedy(len(case.tokens), case.depth_fields) for case in cases]
    for case, out in zip(cases, generate(llm, [c.prompt for c in cases], params), strict=True):
        assert_case(case, out.tokens, out.depths, out.logprobs)
    bench.assert_idle(llm)


@bench.on("cramped")
def test_in_chunks_and_preempted(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch(llm, monkeypatch)
    run_golden(llm, every=5)
    assert seen["chunks"] >= 3 and seen["preempted"] >= 3, seen


@bench.on("cramped")
def test_only_true_positions_are_shared(llm: Any) -> None:
    """A turn that skipped loops, then a turn at full depth over it, cold and warm."""
    rng = random.Random(1)
    first = [rng.randrange(256) for _ in range(18)]
    turn = generate(llm, [first], greedy(20, {"forced_depths": [2, 1, 4]}))[0]
    second = first + turn.tokens + [7, 8, 9]
    request, params = {"prompt_token_ids": second}, greedy(8, FULL)
    answer = llm.generate(request, params, use_tqdm=False)[0]
    assert answer.num_cached_tokens == bench.BLOCK, "only the first turn's prompt is true"
    expected = Reference(CHECKPOINTS["t4-mha"]).generate(second, 8)
    warm = Output.of(answer.outputs[0])
    assert_same("warm", warm.tokens, warm.depths, expected.tokens, expected.depths)
    for index, (ours, theirs) in enumerate(zip(warm.logprobs, expected.logprobs, strict=True)):
        assert abs(ours - theirs) <= LOGPROB_TOLERANCE, f"token {index}"


@bench.on("cramped")
def test_the_context_length_ends_a_request(llm: Any) -> None:
    limit = llm.llm_engine.vllm_config.model_config.max_model_len
    for spare, depths in ((90, [1]), (5, [2, 1]), (1, [1])):
        params = greedy(200, {"forced_depths": depths}, logprobs=None)
        (out,) = generate(llm, [[9] * (limit - spare)], params)
        assert (len(out.tokens), out.finish_reason) == (spare, "length")
    bench.assert_idle(llm)


CHUNKS = {"max_num_batched_tokens": 24, "max_num_seqs": 8, "num_gpu_blocks_override": 256}


@pytest.mark.long
@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize(
    ("options", "kind"),
    [(CHUNKS, "chunks"), (bench.CRAMPED, "preempted")],
    ids=["chunks", "cramped"],
)
def test_every_long_case_in_chunks_and_preempted(
    options: dict[str, Any], kind: str, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options | {"async_scheduling": asynchronous}
    with bench.engine(CHECKPOINTS["t4-mha"], **options) as llm:
        seen = watch(llm, monkeypatch)
        run_golden(llm, every=1)
        assert seen[kind] >= 9, seen


@bench.on("cramped")
def test_prompts_of_one_token_a_step_beside_lanes(llm: Any) -> None:
    """Then a batch has a row for each request though some are prompts, and positions that a
    preemption lost are filled in one by one, with the depths they had."""
    depths = ({"exit_threshold": 0.3}, {"forced_depths": [1, 2, 1, 3]})
    arrivals = [
        Arrival(
            str(index),
            [5 + 3 * index + place for place in range(9 + index)],
            greedy(45, depths[index % 2], logprobs=None),
            index,
        )
        for index in range(5)
    ]
    alone = [generate_one(llm, arrival.prompt, arrival.params) for arrival in arrivals]
    scheduler, requests = scheduler_of(llm), bench.lane_state(llm).requests
    row_stops, replays = requests.row_stops, []

    def noting(req_ids: Any, *args: Any) -> Any:
        stops = row_stops(req_ids, *args)
        if stops is not None and len(stops) == len(req_ids):
            replays.append(stops)
        return stops

    with (
        mock.patch.object(scheduler.scheduler_config, "long_prefill_token_threshold", 1),
        # What drafts would need beyond this decides who is preempted when.
        mock.patch.object(scheduler, "num_lookahead_tokens", 3),
        mock.patch.object(requests, "row_stops", noting),
    ):
        scheduler.reset_prefix_cache()
        seen = drive(llm, arrivals)
    assert replays, "nobody was filled in row by row"
    for arrival, want in zip(arrivals, alone, strict=True):
        out = seen[arrival.name, 0]
        assert_same(arrival.name, out.tokens, out.depths, want.tokens, want.depths)
    bench.assert_idle(llm)
