"""A request whose tokens stop at `max_loops` neither runs nor holds a loop after it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from vllm import LLM

from tests.engine.cases import CHECKPOINTS
from tests.engine.compare import LOGPROB_TOLERANCE, assert_same
from tests.engine.harness import (
    BLOCK,
    Arrival,
    Output,
    assert_idle,
    count_preemptions,
    drive,
    engine,
    generate,
    greedy,
    pages_by_loop,
)
from tests.reference.model import Reference

CHECKPOINT, LOOPS = CHECKPOINTS["t4-mha"], 4
SHORT = range(1, LOOPS)
"""`max_loops` that cap something."""


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """Prompts in chunks, and a cache."""
    options = {"enable_prefix_caching": True, "max_num_batched_tokens": 48, "max_num_seqs": 16}
    with engine(CHECKPOINT, **options) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(CHECKPOINT)


@pytest.fixture(autouse=True)
def cold(llm: LLM) -> Iterator[None]:
    """Every test starts with an empty cache, and leaves nothing behind."""
    assert llm.reset_prefix_cache()
    yield
    assert_idle(llm)


def random_tokens(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(count)]


def ask(llm: LLM, prompt: list[int], tokens: int, depth: dict[str, Any]) -> tuple[Output, int]:
    """One greedy answer, and how many prompt tokens came out of the cache."""
    request = {"prompt_token_ids": prompt}
    answer = llm.generate(request, greedy(tokens, depth), use_tqdm=False)[0]
    return Output.of(answer.outputs[0]), answer.num_cached_tokens or 0


def test_tokens_and_depths_are_those_of_a_prompt_that_ran_every_loop(
    llm: LLM, reference: Reference
) -> None:
    prompts = [random_tokens(seed, 20 + 23 * seed) for seed in range(4)]
    asked = [
        {"max_loops": loops, "exit_threshold": threshold, "exit_mode": mode}
        for loops in SHORT
        for threshold in (0.4, 1.0)
        for mode in ("skip", "exact")
    ]
    pairs = [(prompt, depth) for prompt in prompts for depth in asked]
    for _ in ("cold", "warm"):
        outputs = generate(llm, [p for p, _ in pairs], [greedy(12, depth) for _, depth in pairs])
        for (prompt, depth), out in zip(pairs, outputs, strict=True):
            wanted = reference.generate(
                prompt,
                12,
                threshold=depth["exit_threshold"],
                mode=depth["exit_mode"],
                max_loops=depth["max_loops"],
            )
            margins = [wanted.margin(index) for index in range(12)]
            both = (out.tokens, out.depths, wanted.tokens, wanted.depths)
            assert_same(f"{depth} {len(prompt)}", *both, margins)


@pytest.mark.parametrize("mode", ["skip", "exact"])
@pytest.mark.parametrize("loops", SHORT)
def test_what_ran_is_what_is_billed(llm: LLM, mode: str, loops: int) -> None:
    depth = {"max_loops": loops, "exit_threshold": 0.4, "exit_mode": mode}
    out, _ = ask(llm, random_tokens(1, 20), 12, depth)
    later = [loops] * 11 if mode == "exact" else out.depths[1:]
    assert out.loops_run == [loops, *later]


@pytest.mark.parametrize(
    ("depth", "loops"),
    [
        ({"max_loops": 1}, 1),
        ({"max_loops": 3, "exit_mode": "exact"}, 3),
        ({"forced_depths": [2, 1]}, 2),
        ({"max_loops": 2, "exit_mode": "lossless"}, LOOPS),
        ({"exit_threshold": 0.3}, LOOPS),
    ],
    ids=str,
)
def test_a_request_holds_pages_of_the_loops_that_it_can_read(
    llm: LLM, depth: dict[str, Any], loops: int
) -> None:
    params = greedy(8, depth)
    llm.llm_engine.add_request("held", {"prompt_token_ids": random_tokens(2, 70)}, params)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        held = pages_by_loop(llm)
        assert held in ([0] * LOOPS, [held[0]] * loops + [0] * (LOOPS - loops))


def test_the_cache_gives_what_has_the_loops_that_are_needed(llm: LLM, reference: Reference) -> None:
    prompt = random_tokens(3, 3 * BLOCK + 5)
    for ran, loops, hits in (
        (1, 2, 0),  # ran loop 1, now loop 2 is needed
        (2, 1, 3),
        (2, 2, 3),
        (2, 4, 0),
        (4, 3, 3),
        (4, 4, 3),
    ):
        assert llm.reset_prefix_cache()
        ask(llm, prompt, 1, {"max_loops": ran})
        out, cached = ask(llm, prompt, 8, {"max_loops": loops})
        assert cached == hits * BLOCK, (ran, loops)
        wanted = reference.generate(prompt, 8, max_loops=loops, mode="skip")
        assert_same(f"{ran} {loops}", out.tokens, out.depths, wanted.tokens, wanted.depths)


def test_what_was_generated_at_few_loops_is_shared_at_these(llm: LLM, reference: Reference) -> None:
    prompt = random_tokens(4, 20)
    first, _ = ask(llm, prompt, 60, {"forced_depths": [3, 2]})
    chat = prompt + first.tokens
    for loops, hits in ((4, 0), (3, 0), (2, 2), (1, 2)):
        out, cached = ask(llm, chat, 8, {"max_loops": loops})
        assert cached == hits * BLOCK, loops
        wanted = reference.generate(chat, 8, max_loops=loops, mode="skip")
        assert_same(f"{loops}", out.tokens, out.depths, wanted.tokens, wanted.depths)
        assert llm.reset_prefix_cache()
        ask(llm, prompt, 60, {"forced_depths": [3, 2]})


def test_log_probabilities_of_a_prompt_are_the_last_loops_all_the_same(
    llm: LLM, reference: Reference
) -> None:
    prompt = random_tokens(5, 40)
    params = greedy(4, {"max_loops": 1}, prompt_logprobs=1)
    llm_answer = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0]
    wanted = reference.prompt_states(prompt)[1][-1].log_softmax(-1)
    assert llm_answer.prompt_logprobs is not None
    for position, entry in enumerate(llm_answer.prompt_logprobs[1:], 1):
        assert entry is not None
        off = abs(entry[prompt[position]].logprob - float(wanted[position - 1, prompt[position]]))
        assert off <= LOGPROB_TOLERANCE, position


def test_preempted_among_others_it_answers_as_alone(reference: Reference) -> None:
    arrivals = [
        Arrival(
            f"{number}",
            random_tokens(number, 10 + 5 * number),
            greedy(40, {"max_loops": 1 + number % 4, "exit_threshold": 0.5}),
        )
        for number in range(12)
    ]
    options = {"blocks": 5, "max_model_len": 128, "max_num_seqs": 12}
    with engine(CHECKPOINT, enable_prefix_caching=True, **options) as cramped:
        preempted = count_preemptions(cramped)
        seen = drive(cramped, arrivals)
        assert len(preempted) >= 5
        assert_idle(cramped)
    for number, arrival in enumerate(arrivals):
        out = seen[arrival.name, 0]
        wanted = reference.generate(
            arrival.prompt, 40, threshold=0.5, mode="skip", max_loops=1 + number % 4
        )
        margins = [wanted.margin(index) for index in range(40)]
        both = (out.tokens, out.depths, wanted.tokens, wanted.depths)
        assert_same(arrival.name, *both, margins)
