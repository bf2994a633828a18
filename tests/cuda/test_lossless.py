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
    Arrival,
    Output,
    drive,
    generate,
    generate_one,
    greedy,
    scheduler_of,
)
from tests.engine.mixes import assert_same_values

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
    {"logprobs": None, "temperature": 1.0, "seed": 7},
    {"logprobs": 5, "temperature": 0.9, "seed": 5, "top_k": 8, "min_p": 0.02},
    {"temperature": 0.8, "seed": 3, "top_p": 0.9, "repetition_penalty": 1.2, "min_tokens": 9},
    {"logprobs": 2, "logprob_token_ids": [3, 4], "logit_bias": {5: 2.0, 9: -3.0}, "min_tokens": 5}
    | {"temperature": 1.2, "seed": 11, "stop_token_ids": [7]},
]


def lossless(draft: dict[str, Any]) -> dict[str, Any]:
    return {"exit_mode": "lossless", **draft}


def same_answer(what: object, got: Output, wanted: Output) -> None:
    """Tokens, end, and log-probabilities within the order of summation."""
    assert got.tokens == wanted.tokens, what
    assert (got.finish_reason, got.stop_reason) == (wanted.finish_reason, wanted.stop_reason), what
    assert_same_values(str(what), got, wanted)


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


def golden(llm: Any, checkpoint: str) -> int:
    """Cases of every loop, each drafted in two of four ways, in one batch by the pieces alone and
    in another by vLLM's sampler; drafts made."""
    cases = [case for case in golden_cases(checkpoint, ("full",)) if len(case.prompt) <= 17]
    made = 0
    for logprobs, some in ((None, cases), (1, cases[1:2])):
        asked = [(case, draft) for i, case in enumerate(some) for draft in DRAFTS[i % 2 : 4 : 2]]
        params = [greedy(len(c.tokens), lossless(d), logprobs=logprobs) for c, d in asked]
        outs = generate(llm, [case.prompt for case, _ in asked], params)
        for (case, draft), out in zip(asked, outs, strict=True):
            check(case, out, draft)
            made += sum(map(bool, out.drafts))
    bench.assert_idle(llm)
    return made


@bench.on("t4")
def test_golden_answers_of_four_loops(llm: Any) -> None:
    assert golden(llm, "t4-mha") > 50


@bench.on("t6")
def test_golden_answers_of_six_loops(llm: Any) -> None:
    assert golden(llm, "t6-gqa") > 50


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
    ids, ways = prompts(2), DRAFTS[:3:2]
    wanted = generate(llm, ids, [greedy(12, FULL, **options)] * 2)
    asked = [greedy(12, lossless(draft), **options) for draft in ways for _ in ids]
    outs = generate(llm, ids * len(ways), asked)
    right = 0
    for index, got in enumerate(outs):
        same_answer((options, ways[index // 2]), got, wanted[index % 2])
        right += sum(depth < 4 for depth in got.depths)
    if "repetition_penalty" in options:
        assert not right, "what counts the tokens before it is not drafted"
    else:
        assert right > 10, "hardly a draft was right: this tests nothing"
    bench.assert_idle(llm)


@bench.on("mini")
def test_where_an_answer_ends(llm: Any) -> None:
    """At `max_tokens`, the model's length, or a stop token, that was drafted or not."""
    (ids,) = prompts(1)
    limit = llm.llm_engine.vllm_config.model_config.max_model_len
    (free,) = generate(llm, [ids], [greedy(12, FULL, logprobs=None)])
    ends = [(ids, {"max_tokens": count}) for count in (1, 2, 5)]
    ends += [(ids, {"stop_token_ids": [free.tokens[place]]}) for place in (0, 6)]
    ends += [((ids * limit)[: limit - spare], {"max_tokens": 50}) for spare in (1, 7)]
    ways = [FULL, *(lossless(draft) for draft in DRAFTS[:3])]
    asked = [(prompt, {"max_tokens": 12, **end}, way) for prompt, end in ends for way in ways]
    params = [greedy(**end, depth=way, logprobs=None) for _, end, way in asked]
    outs = generate(llm, [prompt for prompt, _, _ in asked], params)
    for index, ((_, end, way), out) in enumerate(zip(asked, outs, strict=True)):
        same_answer((end, way), out, outs[index // len(ways) * len(ways)])
        assert out.finish_reason == "stop" or out.drafts[-1] == 0, "it would start nothing"
    assert [len(out.tokens) for out in outs[:: len(ways)]][-2:] == [1, 7]
    bench.assert_idle(llm)


@bench.on("mini")
def test_an_abort_in_mid_flight_leaves_nothing_behind(llm: Any) -> None:
    ids, drafts = prompts(4), bench.lane_state(llm).buffers.drafts
    params = greedy(14, lossless({"exit_threshold": 0.0}), logprobs=None)
    arrivals = [
        Arrival(str(index), prompt, params, step=0, abort_after=4 if index in (1, 2) else None)
        for index, prompt in enumerate(ids)
    ]
    drafts.carried_alive.zero_()
    flying, step = [], llm.llm_engine.step

    def noting() -> Any:
        flying.append(int(drafts.carried_alive.sum()))
        return step()

    with mock.patch.object(llm.llm_engine, "step", noting):
        seen = drive(llm, arrivals)
    assert max(flying) > len(ids), "nothing was in flight beyond each request's oldest position"
    bench.assert_idle(llm)
    assert not bench.lane_state(llm).requests._flights
    for index in (0, 3):
        (alone,) = generate(llm, [ids[index]], [greedy(14, FULL, logprobs=None)])
        same_answer(index, seen[str(index), 0], alone)


@bench.on("mini")
def test_what_is_confirmed_is_published_and_nothing_else(llm: Any) -> None:
    (ids,) = prompts(1)
    full = greedy(40, FULL, logprobs=None, skip_reading_prefix_cache=True)
    (answer,) = generate(llm, [ids], [full])
    for draft in DRAFTS[:3:2]:
        llm.reset_prefix_cache()
        (first,) = generate(llm, [ids], [greedy(30, lossless(draft), logprobs=None)])
        assert first.tokens == answer.tokens[:30], draft
        longer = {"prompt_token_ids": [*ids, *first.tokens]}
        (second,) = llm.generate([longer], greedy(10, FULL, logprobs=None), use_tqdm=False)
        known = len(longer["prompt_token_ids"])
        assert second.num_cached_tokens == (known - 1) // bench.BLOCK * bench.BLOCK, draft
        assert list(second.outputs[0].token_ids) == answer.tokens[30:], draft


def crowd(llm: Any, count: int, seed: int, longest: int) -> None:
    """Requests of every mode with any options, which come and go, against each alone; a lossless
    one at full depth."""
    rng = random.Random(seed)
    others = [FULL, {"exit_threshold": 0.3}, {"exit_threshold": 0.3, "exit_mode": "exact"}]
    arrivals = []
    for index, prompt in enumerate(prompts(count, seed)):
        depth = rng.choice(others) if index % 3 == 2 else lossless(rng.choice(DRAFTS))
        params = greedy(rng.randint(9, longest), depth, **rng.choice(OPTIONS))
        gone = 4 if rng.random() < 0.15 else None
        arrivals.append(Arrival(str(index), prompt, params, index // 3, gone))
    seen = drive(llm, arrivals)
    bench.assert_idle(llm)
    right = 0
    for arrival in arrivals:
        if arrival.abort_after is not None:
            continue
        alone, depth = arrival.params.clone(), arrival.params.extra_args
        got = seen[arrival.name, 0]
        if depth.get("exit_mode") == "lossless":
            alone.extra_args = FULL
            known = zip(got.drafts, got.depths, strict=True)
            right += sum(0 < drafted == depth for drafted, depth in known)
        same_answer((arrival.name, depth), got, generate_one(llm, arrival.prompt, alone))
    assert right > count, "hardly a draft was right: this tests nothing"


@bench.on("mini")
def test_whatever_a_crowd_asks_for_each_gets_what_it_gets_alone(llm: Any) -> None:
    crowd(llm, 8, seed=1, longest=12)


@pytest.mark.long
@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("options", [{}, bench.CRAMPED], ids=["roomy", "cramped"])
@pytest.mark.parametrize("seed", range(3))
def test_larger_crowds(options: dict[str, Any], asynchronous: bool, seed: int) -> None:
    options = {**options, "async_scheduling": asynchronous, "max_model_len": 96}
    with bench.engine(str(bench.MINI), **options) as llm:
        crowd(llm, 20, 2 + seed, longest=40)
