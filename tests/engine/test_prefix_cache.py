"""The prefix cache offers only positions with true K/V at every loop."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from vllm import LLM
from vllm.v1.core.kv_cache_utils import get_group_id

from tests.engine.cases import CHECKPOINTS
from tests.engine.compare import LOGPROB_TOLERANCE, assert_same, first_difference
from tests.engine.harness import BLOCK, Output, engine, generate, greedy, scheduler_of
from tests.reference.model import Reference

CHECKPOINT, LOOPS = CHECKPOINTS["t4-mha"], 4
FULL = {"exit_threshold": 1.0}


@pytest.fixture(scope="module")
def cached() -> Iterator[LLM]:
    with engine(CHECKPOINT, enable_prefix_caching=True, max_model_len=512) as llm:
        yield llm


@pytest.fixture(autouse=True)
def cold(cached: LLM) -> None:
    """Every test starts with an empty cache."""
    assert cached.reset_prefix_cache()


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(CHECKPOINT)


def random_tokens(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(count)]


def ask(llm: LLM, prompt: list[int], tokens: int, depth: dict[str, Any]) -> tuple[Output, int]:
    """One greedy answer, and how many prompt tokens came out of the cache."""
    request = {"prompt_token_ids": prompt}
    answer = llm.generate(request, greedy(tokens, depth), use_tqdm=False)[0]
    return Output.of(answer.outputs[0]), answer.num_cached_tokens or 0


def published_pages(llm: LLM) -> list[int]:
    """By loop."""
    pool = scheduler_of(llm).kv_cache_manager.block_pool
    groups = [get_group_id(key) for key in pool.cached_block_hash_to_block._cache]
    return [groups.count(loop) for loop in range(LOOPS)]


@pytest.mark.parametrize("threshold", [0.1, 0.5])
def test_skipping_turn_then_full_turn_equals_a_cold_full_run(
    cached: LLM, reference: Reference, threshold: float
) -> None:
    first = random_tokens(1, 40)
    skipped, _ = ask(cached, first, 60, {"exit_threshold": threshold, "exit_mode": "skip"})
    assert min(skipped.depths) < 4, "nothing was skipped"
    second = first + skipped.tokens + random_tokens(2, 9)
    warm, hits = ask(cached, second, 20, FULL)
    assert cached.reset_prefix_cache()
    cold, none = ask(cached, second, 20, FULL)
    expected = reference.generate(second, 20)
    assert (none, hits) == (0, BLOCK), "only the first turn's prompt may come out of the cache"
    assert_same("warm and cold", warm.tokens, warm.depths, cold.tokens, cold.depths)
    assert_same("reference", warm.tokens, warm.depths, expected.tokens, expected.depths)
    for index, (left, right) in enumerate(zip(warm.logprobs, cold.logprobs, strict=True)):
        assert abs(left - right) <= LOGPROB_TOLERANCE, f"log-probability of token {index}"


def test_a_position_that_left_early_ends_what_is_published(cached: LLM) -> None:
    prompt = random_tokens(3, 31)
    # Tokens 0..39 sit at positions 31..70; the 35th is the first whose position leaves early.
    depths = [4] * 35 + [2] + [4] * 60
    ask(cached, prompt, 90, {"forced_depths": depths})
    # Token 35 is read out at position 31 + 34 = 65: block 2 has a page for each loop that it ran.
    assert published_pages(cached) == [3, 3, 2, 2]


@pytest.mark.parametrize("depth", [FULL, {"exit_threshold": 0.3, "exit_mode": "exact"}])
def test_true_generated_positions_are_shared(
    cached: LLM, reference: Reference, depth: dict[str, Any]
) -> None:
    first = random_tokens(4, 20)
    answer, _ = ask(cached, first, 87, depth)
    second = first + answer.tokens + random_tokens(5, 5)
    warm, hits = ask(cached, second, 20, FULL)
    assert hits == 3 * BLOCK, f"{hits} tokens from the cache"
    expected = reference.generate(second, 20)
    assert_same("second turn", warm.tokens, warm.depths, expected.tokens, expected.depths)


def test_whatever_mixed_requests_leave_a_full_reader_sees_the_truth(
    cached: LLM, reference: Reference
) -> None:
    rng = random.Random(6)
    shared = random_tokens(7, 32)
    chats = [shared + random_tokens(8 + number, rng.randint(1, 50)) for number in range(8)]
    for turn in range(3):
        depth = [
            {
                "forced_depths": [rng.choice([1, 2, 3, 4, 4, 4]) for _ in range(40)],
                "exit_mode": rng.choice(["skip", "exact"]),
            }
            if rng.random() < 0.6
            else {"exit_threshold": rng.choice([0.2, 0.6, 1.0])}
            for _ in chats
        ]
        outputs = generate(cached, chats, [greedy(rng.randint(1, 40), d) for d in depth])
        chats = [chat + out.tokens for chat, out in zip(chats, outputs, strict=True)]
        readers = generate(cached, chats, greedy(6, FULL))
        for number, (chat, out) in enumerate(zip(chats, readers, strict=True)):
            expected = reference.generate(chat, 6)
            both = (out.tokens, out.depths, expected.tokens, expected.depths)
            assert_same(f"turn {turn} chat {number}", *both, expected.logit_margins)
            for index in range(first_difference(*both) or 6):
                off = abs(out.logprobs[index] - expected.logprobs[index])
                assert off <= LOGPROB_TOLERANCE, f"turn {turn} chat {number} token {index}: {off}"


def test_generation_from_a_warm_cache_equals_a_cold_one_in_every_mode(
    cached: LLM, reference: Reference
) -> None:
    prompt = random_tokens(20, 75)
    ask(cached, prompt, 1, FULL)
    for mode in ("skip", "exact"):
        for threshold in (0.1, 0.5, 0.9):
            depth = {"exit_threshold": threshold, "exit_mode": mode}
            out, hits = ask(cached, prompt, 16, depth)
            assert hits == 2 * BLOCK
            expected = reference.generate(prompt, 16, threshold=threshold, mode=mode)
            margins = [expected.margin(index) for index in range(16)]
            both = (out.tokens, out.depths, expected.tokens, expected.depths)
            assert_same(f"{mode} {threshold}", *both, margins)
