"""Lossless: drafts on the device, and the answer of every loop."""

from __future__ import annotations

import random
from typing import Any
from unittest import mock

import pytest

from tests.cuda import bench
from tests.engine.cases import Case, golden_cases
from tests.engine.compare import LOGPROB_TOLERANCE, assert_case
from tests.engine.harness import (
    Output,
    generate,
    generate_one,
    greedy,
    scheduler_of,
)

T = {"t4-mha": 4, "t6-gqa": 6}
FULL = {"exit_threshold": 1.0}
DRAFTS: list[dict[str, Any]] = [
    {},  # where the server's rule says
    *({"exit_threshold": q} for q in (0.0, 0.2, 0.5)),
    {"exit_threshold": 0.0, "min_loops": 2},
    {"exit_threshold": 1.0, "max_loops": 3},
    {"forced_depths": [2]},
]
"""When tokens are drafted."""
OPTIONS: list[dict[str, Any]] = [
    {},
    {"logprobs": None},
    {"logprobs": None, "temperature": 1.0, "seed": 7},
    {"logprobs": 5, "temperature": 0.9, "seed": 5, "top_k": 8, "min_p": 0.02},
    {"temperature": 0.8, "seed": 3, "top_p": 0.9, "repetition_penalty": 1.2, "min_tokens": 9},
    {"temperature": 1.2, "seed": 11, "logprobs": 2, "logprob_token_ids": [3, 4]},
    {"logit_bias": {5: 2.0, 9: -3.0}, "min_tokens": 5, "stop_token_ids": [7]},
]


def lossless(draft: dict[str, Any]) -> dict[str, Any]:
    return {"exit_mode": "lossless", **draft}


def same_answer(what: object, got: Output, wanted: Output) -> None:
    """Tokens, end, and log-probabilities within the order of summation."""
    assert got.tokens == wanted.tokens, what
    assert (got.finish_reason, got.stop_reason) == (wanted.finish_reason, wanted.stop_reason), what
    for left, right in zip(got.entries, wanted.entries, strict=True):
        assert left.keys() == right.keys(), what
        assert all(abs(left[t] - right[t]) < LOGPROB_TOLERANCE for t in left), what


def check(case: Case, out: Output, what: object) -> None:
    """What the released code says; and the bill adds up."""
    assert tuple(out.tokens) == case.tokens, (case.name, what)
    for ours, theirs in zip(out.logprobs, case.logprobs, strict=False):
        assert abs(ours - theirs) < LOGPROB_TOLERANCE, (case.name, what)
    loops = T[case.checkpoint]
    assert min(out.loops_run) >= loops, "confirming runs every loop"
    for depth, drafted in zip(out.depths, out.drafts, strict=True):
        assert depth in (loops, drafted), (case.name, what)
    assert out.drafts[0] == out.drafts[-1] == 0, "neither a prompt nor a last token is drafted"


def golden(llm: Any, checkpoint: str, every: int, drafts: list[dict[str, Any]]) -> int:
    """Cases of every loop in one batch, drafted in several ways; drafts made."""
    cases = [case for case in golden_cases(checkpoint, ("full",)) if len(case.prompt) <= 17]
    cases, made = cases[::every], 0
    asked = [(case, draft, plain) for case in cases for draft in drafts for plain in (True, False)]
    for plain in (True, False):
        part = [(case, draft) for case, draft, kind in asked if kind == plain]
        outs = generate(
            llm,
            [case.prompt for case, _ in part],
            [greedy(len(c.tokens), lossless(d), logprobs=None if plain else 1) for c, d in part],
        )
        for (case, draft), out in zip(part, outs, strict=True):
            check(case, out, draft)
            made += sum(map(bool, out.drafts))
    bench.assert_idle(llm)
    return made


@bench.on("t4")
def test_golden_answers_of_four_loops(llm: Any) -> None:
    assert golden(llm, "t4-mha", 3, DRAFTS[:4]) > 50


@bench.on("t6")
def test_golden_answers_of_six_loops(llm: Any) -> None:
    assert golden(llm, "t6-gqa", 4, DRAFTS[:4]) > 50


@bench.on("t4")
def test_golden_answers_alone(llm: Any) -> None:
    (case, *_) = golden_cases("t4-mha", ("full",))
    for draft in DRAFTS:
        out = generate_one(llm, case.prompt, greedy(len(case.tokens), lossless(draft)))
        check(case, out, draft)
        if draft:
            assert sum(map(bool, out.drafts)) > 3, draft
    bench.assert_idle(llm)


@bench.on("t4")
def test_a_crowd_of_every_mode(llm: Any) -> None:
    """Lossless requests beside those that skip, run on, or run every loop."""
    cases = [case for case in golden_cases("t4-mha") if len(case.prompt) <= 9][::3]
    asked = [case.depth_fields for case in cases]
    for index, case in enumerate(cases):
        if case.mode == "full":
            asked[index] = lossless(DRAFTS[1 + index % 3])
    params = [greedy(len(c.tokens), d) for c, d in zip(cases, asked, strict=True)]
    outs = generate(llm, [case.prompt for case in cases], params)
    for case, depth, out in zip(cases, asked, outs, strict=True):
        if depth.get("exit_mode") == "lossless":
            check(case, out, depth)
        else:
            assert_case(case, out.tokens, out.depths, out.logprobs)
    bench.assert_idle(llm)


@bench.on("cramped")
def test_in_chunks_and_preempted(llm: Any) -> None:
    """What is in flight when a prompt or a preemption comes is dropped, and nobody sees it."""
    cases = [case for case in golden_cases("t4-mha", ("full",)) if len(case.prompt) in (17, 33)]
    asked = [(case, draft) for case in cases for draft in DRAFTS[:4]]
    scheduler = scheduler_of(llm)
    with mock.patch.object(scheduler, "_preempt_request", wraps=scheduler._preempt_request) as left:
        params = [greedy(len(c.tokens), lossless(d), logprobs=None) for c, d in asked]
        outs = generate(llm, [c.prompt for c, _ in asked], params)
    for (case, draft), out in zip(asked, outs, strict=True):
        check(case, out, draft)
    assert left.call_count >= 3
    bench.assert_idle(llm)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(5, 250) for _ in range(rng.randrange(3, 20))] for _ in range(count)]


@bench.on("mini")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_as_at_full_depth(llm: Any, options: dict[str, Any]) -> None:
    ids = prompts(3)
    wanted = generate(llm, ids, [greedy(14, FULL, **options)] * 3)
    asked = [greedy(14, lossless(draft), **options) for draft in DRAFTS[:5] for _ in ids]
    outs = generate(llm, ids * 5, asked)
    right = 0
    for index, got in enumerate(outs):
        same_answer(f"{options} {DRAFTS[index // 3]}", got, wanted[index % 3])
        right += sum(depth < 4 for depth in got.depths)
    if "repetition_penalty" in options:
        assert not right, "what counts the tokens before it is not drafted"
    else:
        assert right > 20, "hardly a draft was right: this tests nothing"
    bench.assert_idle(llm)
