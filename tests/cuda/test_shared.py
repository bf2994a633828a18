"""`exit_mode: "shared"`: one plane of K/V once the prompt is complete."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch

from tests.cuda import bench
from tests.cuda.test_cramped import watch
from tests.engine.cases import CHECKPOINTS, MODES, Case, golden_cases
from tests.engine.compare import assert_case, assert_same
from tests.engine.harness import (
    Arrival,
    Output,
    drive,
    generate,
    greedy,
    pages_by_loop,
    runner_of,
    scheduler_of,
)
from tests.reference.model import Reference

SHARED: dict[str, Any] = {"exit_mode": "shared", "exit_threshold": 0.4}
FULL: dict[str, Any] = {"exit_mode": "skip", "exit_threshold": 1.0}
PLAIN: dict[str, Any] = {"logprobs": None}


def random_tokens(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(count)]


def check(llm: Any, cases: Sequence[Case]) -> None:
    """All in one batch."""
    params = [greedy(len(case.tokens), case.depth_fields) for case in cases]
    for case, out in zip(cases, generate(llm, [c.prompt for c in cases], params), strict=True):
        assert_case(case, out.tokens, out.depths, out.logprobs)
    bench.assert_idle(llm)


@bench.on("t6")
@pytest.mark.parametrize("half", [0, pytest.param(1, marks=pytest.mark.long)])
def test_every_golden_case_of_six_loops(llm: Any, half: int) -> None:
    check(llm, golden_cases("t6-gqa", ("shared",))[half::2])


@bench.on("t4")
def test_golden_cases_among_other_modes(llm: Any) -> None:
    cases = golden_cases("t4-mha", ("shared",))
    check(llm, cases + golden_cases("t4-mha")[::9])


@bench.on("t6")
def test_alone_and_one_step_at_a_time(llm: Any) -> None:
    core = llm.llm_engine.engine_core.engine_core
    with mock.patch.multiple(core, batch_queue=None, step_fn=core.step):
        for case in golden_cases("t6-gqa", ("shared",))[::9]:
            check(llm, [case])


@bench.on("t6")
def test_with_every_kernel_in_tritons_interpreter(llm: Any) -> None:
    cases = [c for c in golden_cases("t6-gqa", ("shared",)) if 1 < len(c.prompt) <= 5][:2]
    with bench.interpreted():
        outputs = generate(
            llm, [c.prompt for c in cases], [greedy(5, c.depth_fields) for c in cases]
        )
    for case, out in zip(cases, outputs, strict=True):
        assert (out.tokens, out.depths) == (list(case.tokens[:5]), list(case.depths[:5])), case.name


@bench.on("t6")
def test_without_the_lane_kernels(llm: Any) -> None:
    with mock.patch.object(bench.lane_state(llm).engine, "parts", None):
        check(llm, golden_cases("t6-gqa", ("shared",))[::11])


@bench.on("cramped")
def test_golden_cases_in_chunks_preempted_and_cached(
    llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watch(llm, monkeypatch)
    every = [case for case in golden_cases("t4-mha", MODES) if len(case.prompt) in (17, 33)]
    cases = [case for case in every if case.mode == "shared"]
    cases += [case for case in every if case.mode != "shared"][::6]
    for _ in range(2):
        check(llm, cases)
    assert seen["chunks"] >= 1 and seen["preempted"] >= 3, seen


@bench.on("cramped")
def test_preempted_it_answers_as_alone(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it had generated is computed again over its prompt's last loop, position by position."""
    scheduler = scheduler_of(llm)
    lost: list[int] = []
    schedule = scheduler.schedule

    def noting(*args: Any, **kwargs: Any) -> Any:
        known = {name: request.num_output_tokens for name, request in scheduler.requests.items()}
        plan = schedule(*args, **kwargs)
        lost.extend(
            known[name] for name in plan.preempted_req_ids or () if name in scheduler._shared
        )
        return plan

    monkeypatch.setattr(scheduler, "schedule", noting)
    reference = Reference(CHECKPOINTS["t4-mha"])
    # Two that hold every loop come first, and grow.
    depths: list[dict[str, Any]] = [FULL, FULL]
    depths += [SHARED | {"max_loops": 2 + n % 3} for n in range(6)]
    arrivals = [
        Arrival(str(n), random_tokens(n, 10 + 2 * n), greedy(50, depth, **PLAIN), n // 2)
        for n, depth in enumerate(depths)
    ]
    outputs = drive(llm, arrivals)
    assert sum(count > 0 for count in lost) >= 2, lost
    for depth, arrival in zip(depths, arrivals, strict=True):
        out = outputs[arrival.name, 0]
        wanted = reference.generate(
            arrival.prompt,
            50,
            threshold=depth["exit_threshold"],
            mode=depth["exit_mode"],
            max_loops=depth.get("max_loops"),
        )
        margins = [wanted.margin(index) for index in range(50)]
        both = (out.tokens, out.depths, wanted.tokens, wanted.depths)
        assert_same(f"{arrival.name} {depth}", *both, margins)
        assert out.loops_run == [4, *out.depths[1:]]
    bench.assert_idle(llm)


@bench.on("cramped")
def test_only_the_last_loops_pages_stay_and_the_cache_keeps_the_others(llm: Any) -> None:
    assert llm.reset_prefix_cache()
    prompt = random_tokens(1, 2 * bench.BLOCK + 5)
    llm.llm_engine.add_request("held", {"prompt_token_ids": prompt}, greedy(30, SHARED, **PLAIN))
    (request,) = scheduler_of(llm).requests.values()
    seen: list[list[int]] = []
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        if request.num_output_tokens:
            seen.append(pages_by_loop(llm))
    assert all(pages[:-1] == [0] * 3 for pages in seen)
    assert max(pages[-1] for pages in seen) == 5
    for depth in (SHARED, {"exit_threshold": 1.0}, {"max_loops": 1}):
        answer = llm.generate(
            {"prompt_token_ids": prompt}, greedy(8, depth, **PLAIN), use_tqdm=False
        )[0]
        assert answer.num_cached_tokens == 2 * bench.BLOCK
        out = Output.of(answer.outputs[0])
        wanted = Reference(CHECKPOINTS["t4-mha"]).generate(
            prompt,
            8,
            threshold=depth.get("exit_threshold", 1.0),
            mode=depth.get("exit_mode", "skip"),
            max_loops=depth.get("max_loops"),
        )
        assert_same(f"{depth}", out.tokens, out.depths, wanted.tokens, wanted.depths)
    bench.assert_idle(llm)


@bench.on("t6")
def test_no_step_in_flight_reads_what_is_let_go(llm: Any) -> None:
    """Pages are let go of when the prompt's last step is back. Whatever was planned since, and is
    planned later, reads none of them: here they become NaN at once."""
    scheduler, runner = scheduler_of(llm), runner_of(llm)
    core = llm.llm_engine.engine_core.engine_core
    let_go, flying, lost = scheduler._let_go, [], []

    def noting(request_id: str) -> None:
        managers = scheduler.kv_cache_manager.coordinator.single_type_managers
        ids = [[b.block_id for b in m.req_to_blocks[request_id]] for m in managers[:-1]]
        let_go(request_id)
        if not any(block for blocks in ids for block in blocks):
            return
        flying.append(len(core.batch_queue))
        pages = torch.tensor([block for blocks in ids for block in blocks if block])
        lost.append(len(pages))
        for cache in runner.kv_caches:
            cache[pages] = torch.nan

    cases = [c for c in golden_cases("t6-gqa", ("shared",)) if len(c.prompt) > 5][:6]
    with mock.patch.object(scheduler, "_let_go", noting):
        check(llm, cases)
    assert len(lost) == len(cases) and all(lost)
    assert any(flying), "no step was in flight"


@bench.on("t4")
def test_what_was_generated_is_never_in_the_cache(llm: Any) -> None:
    prompt = random_tokens(2, bench.BLOCK + 3)
    for depth in (SHARED, {"max_loops": 1}):
        assert llm.reset_prefix_cache()
        (first,) = generate(llm, [prompt], greedy(40, SHARED, **PLAIN))
        chat = {"prompt_token_ids": prompt + first.tokens}
        answer = llm.generate(chat, greedy(2, depth, **PLAIN), use_tqdm=False)[0]
        assert answer.num_cached_tokens == bench.BLOCK, depth
