"""Lossless: drafts on the way, and the answer of every loop."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from vllm import LLM

from ouro_runtime.engine.cpu.sampler import StepSampler
from ouro_runtime.loop.drafts import DraftTrial
from tests.engine.cases import CHECKPOINTS, golden_cases, golden_records
from tests.engine.compare import LOGPROB_TOLERANCE
from tests.engine.harness import (
    Arrival,
    Output,
    assert_idle,
    count_preemptions,
    drive,
    engine,
    generate,
    generate_one,
    greedy,
    runner_of,
    scheduler_of,
)

MINI = "ouro_runtime/checkpoints/ouro-mini"
FULL = {"exit_threshold": 1.0, "exit_mode": "skip"}
DRAFTS: list[dict[str, Any]] = [
    {},  # where the server's rule says
    *({"exit_threshold": q} for q in (0.0, 0.1, 0.3, 0.5, 0.7, 1.0)),
    *({"forced_depths": depths} for depths in ([1], [2], [1, 3], [3, 1, 2])),
    {"exit_threshold": 0.0, "min_loops": 2},
    {"exit_threshold": 1.0, "max_loops": 2},
]
"""When tokens are drafted."""
FEW = [DRAFTS[0], DRAFTS[2], *DRAFTS[-3:-1]]

OPTIONS: list[dict[str, Any]] = [
    {},
    {"logprobs": 5, "presence_penalty": 0.8, "frequency_penalty": 0.5},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 0.8, "seed": 3, "top_p": 0.9, "repetition_penalty": 1.2, "min_tokens": 9},
    {"temperature": 0.9, "seed": 5, "top_k": 8, "min_p": 0.02, "logit_bias": {5: 2.0, 9: -3.0}},
    {"temperature": 1.2, "seed": 11, "logprobs": 2, "logprob_token_ids": [3, 4]},
]


def lossless(draft: dict[str, Any]) -> dict[str, Any]:
    return {"exit_mode": "lossless", **draft}


def same_answer(what: str, got: Output, wanted: Output) -> None:
    """Tokens, end, and log-probabilities within the order of summation."""
    assert got.tokens == wanted.tokens, what
    assert (got.finish_reason, got.stop_reason) == (wanted.finish_reason, wanted.stop_reason), what
    for left, right in zip(got.entries, wanted.entries, strict=True):
        assert left.keys() == right.keys(), what
        assert all(abs(left[t] - right[t]) < LOGPROB_TOLERANCE for t in left), what


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with engine(CHECKPOINTS["t4-mha"]) as llm:
        scheduler_of(llm).draft_trial = None
        yield llm


@pytest.fixture(scope="module")
def mini() -> Iterator[LLM]:
    """A checkpoint whose drafts are often right."""
    with engine(MINI, max_model_len=512) as llm:
        scheduler_of(llm).draft_trial = None
        yield llm


def mini_prompts(count: int) -> list[list[int]]:
    """Token ids that look like nothing; what follows them is as good as any answer."""
    rng = random.Random(count)
    return [[rng.randrange(5, 250) for _ in range(rng.randrange(3, 20))] for _ in range(count)]


@pytest.mark.parametrize("crowd", [False, True], ids=["alone", "crowd"])
def test_golden_answers_whatever_is_drafted(llm: LLM, crowd: bool) -> None:
    cases = golden_cases("t4-mha", ("full",))
    for draft in FEW if crowd else FEW[1:2]:
        asked = [greedy(len(case.tokens), lossless(draft)) for case in cases]
        prompts = [case.prompt for case in cases]
        if crowd:
            outs = generate(llm, prompts, asked)
        else:
            outs = [generate_one(llm, *pair) for pair in zip(prompts, asked, strict=True)]
        for case, out in zip(cases, outs, strict=True):
            assert tuple(out.tokens) == case.tokens, (case.name, draft)
            off = max(abs(a - b) for a, b in zip(out.logprobs, case.logprobs, strict=True))
            assert off < LOGPROB_TOLERANCE, (case.name, draft)
            assert min(out.loops_run) >= 4, "confirming runs every loop"
    assert_idle(llm)


def test_golden_answers_of_six_loops() -> None:
    with engine(CHECKPOINTS["t6-gqa"], max_num_batched_tokens=16, max_num_seqs=16) as llm:
        scheduler_of(llm).draft_trial = None
        cases = golden_cases("t6-gqa", ("full",))
        for draft in FEW[:2]:
            asked = [greedy(len(case.tokens), lossless(draft)) for case in cases]
            outs = generate(llm, [case.prompt for case in cases], asked)
            for case, out in zip(cases, outs, strict=True):
                assert tuple(out.tokens) == case.tokens, (case.name, draft)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_as_at_full_depth(mini: LLM, options: dict[str, Any]) -> None:
    prompts = mini_prompts(4)
    wanted = generate(mini, prompts, [greedy(14, FULL, **options)] * 4)
    right = 0
    for draft in FEW:
        outs = generate(mini, prompts, [greedy(14, lossless(draft), **options)] * 4)
        for got, full in zip(outs, wanted, strict=True):
            same_answer(f"{options} {draft}", got, full)
            right += sum(depth < 4 for depth in got.depths)
    assert right > 20, "hardly a draft was right: this tests nothing"


def test_a_stop_in_a_draft_ends_a_request_only_when_confirmed(mini: LLM) -> None:
    prompts = mini_prompts(5)
    full = generate(mini, prompts, [greedy(16, FULL)] * 5)
    for place in (0, 7):
        stops = [[out.tokens[place]] for out in full]
        wanted, *drafted = (
            generate(mini, prompts, [greedy(16, d, stop_token_ids=s) for s in stops])
            for d in (FULL, *(lossless(d) for d in FEW))
        )
        for draft, outs in zip(FEW, drafted, strict=True):
            for got, expected in zip(outs, wanted, strict=True):
                same_answer(f"stop at {place}, {draft}", got, expected)
    assert_idle(mini)


def test_up_to_the_last_token(mini: LLM) -> None:
    """max_tokens, and the model's own length, end an answer where they do at full depth."""
    (prompt,) = mini_prompts(1)
    full = generate_one(mini, prompt, greedy(9, FULL))
    for limit in (1, 2, 5, 9):
        for draft in FEW:
            out = generate_one(mini, prompt, greedy(limit, lossless(draft)))
            assert out.tokens == full.tokens[:limit] and out.finish_reason == "length"
            assert out.drafts[-1] == 0, "a draft of the last token starts nothing"
    long = (prompt * 512)[:505]
    ends = [
        generate_one(mini, long, greedy(50, depth))
        for depth in (FULL, *(lossless(draft) for draft in FEW))
    ]
    assert all(out.tokens == ends[0].tokens for out in ends) and len(ends[0].tokens) == 7


def test_what_was_run_is_what_is_billed(mini: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request's loops run add up to the cells of its decoding, and its drafts to those that were
    sampled, dropped ones included."""
    counted = {"cells": 0, "drafts": 0}
    executor = runner_of(mini).executor
    run, draft = executor.run, StepSampler.draft

    def count_cells(*args: Any, **options: Any) -> Any:
        result = run(*args, **options)
        counted["cells"] += sum(result.pass_rows)
        return result

    def count_drafts(self: Any, rows: Any, logits: Any) -> Any:
        counted["drafts"] += len(rows)
        return draft(self, rows, logits)

    monkeypatch.setattr(executor, "run", count_cells)
    monkeypatch.setattr(StepSampler, "draft", count_drafts)
    dropped = 0
    for depth in FEW:
        for prompt in mini_prompts(3):
            counted |= {"cells": 0, "drafts": 0}
            out = generate_one(mini, prompt, greedy(16, lossless(depth)))
            made = sum(loop > 0 for loop in out.drafts) + sum(out.drafts_dropped)
            dropped += sum(out.drafts_dropped)
            assert sum(out.loops_run) + 4 * (len(prompt) - 1) == counted["cells"], depth
            assert made == counted["drafts"], depth
            known = zip(out.depths, out.drafts, strict=True)
            assert all(depth in (loop, 4) for depth, loop in known)
    assert dropped, "nothing was ever dropped: this tests little"


def test_where_drafts_do_not_pay_only_who_asks_for_them_is_drafted(mini: LLM) -> None:
    (prompt,) = mini_prompts(1)
    scheduler = scheduler_of(mini)

    class Never(DraftTrial):
        def decide(self, requests: int) -> bool:
            return False

    scheduler.draft_trial = Never()
    try:
        left, own = (
            generate_one(mini, prompt, greedy(16, lossless(d))) for d in ({}, {"exit_threshold": 0})
        )
    finally:
        scheduler.draft_trial = None
    assert left.depths == left.loops_run == [4] * 16
    assert own.tokens == left.tokens and own.depths != left.depths


def crowd_of(count: int, tokens: int) -> list[Arrival]:
    rng = random.Random(count)
    modes = [FULL, {"exit_threshold": 0.3}, {"exit_threshold": 0.3, "exit_mode": "exact"}]
    prompts = mini_prompts(count)
    return [
        Arrival(
            str(number),
            prompts[number],
            greedy(
                tokens,
                modes[number % 3] if number % 4 == 3 else lossless(rng.choice(FEW)),
                **rng.choice(OPTIONS),
            ),
            step=number // 3,
            abort_after=4 if number % 7 == 6 else None,
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("blocks", [511, 13], ids=["roomy", "cramped"])
def test_a_crowd_answers_as_alone(blocks: int) -> None:
    """Mixed with other modes, cached, chunked, aborted, and with preemptions in a small pool."""
    options = {
        "max_model_len": 128,
        "blocks": blocks,
        "enable_prefix_caching": True,
        "max_num_batched_tokens": 32,
        "max_num_seqs": 16,
    }
    with engine(MINI, **options) as llm:
        scheduler_of(llm).draft_trial = None
        preempted = count_preemptions(llm)
        arrivals = crowd_of(21, 50)
        seen = drive(llm, arrivals)
        assert bool(preempted) == (blocks == 13)
        for arrival in arrivals:
            if arrival.abort_after is not None:
                continue
            depth = arrival.params.extra_args
            alone = arrival.params.clone()
            if depth.get("exit_mode") == "lossless":
                alone.extra_args = FULL
            got, wanted = seen[arrival.name, 0], generate_one(llm, arrival.prompt, alone)
            same_answer(f"{arrival.name} {depth}", got, wanted)
        assert_idle(llm)


def test_a_preempted_request_draws_as_if_nothing_had_happened() -> None:
    """What its dropped drafts drew is drawn again, also when it is not drafted any more."""
    options = {"max_model_len": 128, "blocks": 13, "max_num_seqs": 16}
    with engine(MINI, **options) as llm:
        preempted = count_preemptions(llm)

        class UntilSomeLeft(DraftTrial):
            def decide(self, requests: int) -> bool:
                return len(preempted) < 6

        scheduler_of(llm).draft_trial = UntilSomeLeft()
        prompt = mini_prompts(1)[0][:4]
        asked = [
            [greedy(60, depth, temperature=2.0, seed=seed) for seed in range(12)]
            for depth in (lossless({}), FULL)
        ]
        outs = generate(llm, [prompt] * 12, asked[0])
        assert len(preempted) > 6 and any(depth < 4 for out in outs for depth in out.depths)
        for seed, got in enumerate(outs):
            same_answer(f"seed {seed}", got, generate_one(llm, prompt, asked[1][seed]))


def test_what_stays_is_published_and_nothing_else() -> None:
    """A second request finds every confirmed block of the first, and computes the same from it."""
    with engine(MINI, max_model_len=256, enable_prefix_caching=True) as llm:
        scheduler_of(llm).draft_trial = None
        (prompt,) = mini_prompts(1)
        full = generate_one(llm, prompt, greedy(100, FULL, skip_reading_prefix_cache=True))
        llm.reset_prefix_cache()
        for draft in FEW:
            first = generate_one(llm, prompt, greedy(80, lossless(draft)))
            assert first.tokens == full.tokens[:80], draft
            longer = [*prompt, *first.tokens]
            answer = llm.generate([{"prompt_token_ids": longer}], greedy(20, FULL), use_tqdm=False)[
                0
            ]
            assert answer.num_cached_tokens == (len(longer) - 1) // 32 * 32, draft
            assert list(answer.outputs[0].token_ids) == full.tokens[80:], draft
            llm.reset_prefix_cache()


def test_drafts_can_be_turned_off() -> None:
    settings = {"ouro": {"drafts": False, "exit_mode": "auto"}}
    with engine(CHECKPOINTS["t4-mha"], additional_config=settings) as llm:
        record = golden_records("t4-mha")[0]
        for depth in (None, lossless({}), lossless({"exit_threshold": 0.0})):
            out = generate_one(llm, record["prompt"], greedy(12, depth))
            assert out.tokens == record["full"]["tokens"][:12]
            assert out.depths == out.loops_run == [4] * 12


def test_auto_drafts_where_every_loop_is_asked_for() -> None:
    with engine(MINI, additional_config={"ouro": {"exit_mode": "auto"}}) as llm:
        scheduler_of(llm).draft_trial = None
        (prompt,) = mini_prompts(1)
        wanted = generate_one(llm, prompt, greedy(30, FULL))
        for depth in (None, {"exit_threshold": 1.0}):
            out = generate_one(llm, prompt, greedy(30, depth))
            same_answer(str(depth), out, wanted)
            assert min(out.depths) < 4, "nothing was drafted"
        skipped = generate_one(llm, prompt, greedy(30, {"exit_threshold": 0.3}))
        assert sum(skipped.loops_run) < 4 * 30
