"""Folded blocks: what a request gives is the same with and without, and it holds fewer pages."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any
from unittest import mock

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
    generate_one,
    greedy,
    pages_by_loop,
    scheduler_of,
)
from tests.reference.model import Reference

CHECKPOINT, LOOPS, TOKENS = CHECKPOINTS["t4-mha"], 4, 130


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """Prompts in chunks, a cache, and so few pages that somebody is preempted in a crowd."""
    options = {
        "enable_prefix_caching": True,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 12,
        "blocks": 14,
    }
    with engine(CHECKPOINT, **options) as llm:
        yield llm


@pytest.fixture(autouse=True)
def cold(llm: LLM) -> Iterator[None]:
    """Every test starts with an empty cache, and leaves nothing behind."""
    assert llm.reset_prefix_cache()
    yield
    assert_idle(llm)


def stretches(rng: random.Random, deepest: int = LOOPS) -> list[int]:
    """Depths that stay low for long; the deeper ones between read what was before."""
    depths: list[int] = []
    while len(depths) < TOKENS:
        most = rng.randint(1, deepest)
        depths += [rng.randint(1, most) for _ in range(rng.randint(20, 60))]
        depths += [deepest] * rng.randint(0, 2)
    return depths


def crowd(rng: random.Random) -> list[Arrival]:
    """Requests in `skip`, whose blocks are folded, among those whose never are."""
    prefix = [rng.randrange(256) for _ in range(BLOCK)]
    fields: list[dict[str, Any]] = [
        *({"exit_mode": "skip", "forced_depths": stretches(rng)} for _ in range(6)),
        *({"exit_mode": "skip", "forced_depths": stretches(rng, 3)} for _ in range(2)),
        {"exit_mode": "skip", "exit_threshold": 0.3},
        {"exit_mode": "skip", "exit_threshold": 0.3, "max_loops": 2},
        {"exit_mode": "skip", "exit_threshold": 1.0},
        {"exit_mode": "exact", "forced_depths": stretches(rng)},
        {"exit_mode": "lossless", "exit_threshold": 0.3},
        {"exit_mode": "shared", "exit_threshold": 0.3},
    ]
    return [
        Arrival(
            name=str(number),
            prompt=(prefix if rng.random() < 0.5 else [])
            + [rng.randrange(256) for _ in range(rng.randint(1, 40))],
            params=greedy(TOKENS, depth, seed=number, temperature=float(number % 3 == 2))
            if number
            else greedy(TOKENS, depth, seed=5, temperature=1.0, n=2),
            step=rng.randint(0, 30),
            abort_after=60 if number == 7 else None,
        )
        for number, depth in enumerate(fields)
    ]


def test_a_crowd_gives_the_same_with_and_without(llm: LLM) -> None:
    folder, arrivals = scheduler_of(llm)._folder, crowd(random.Random(3))
    runs: list[dict[tuple[str, int], Output]] = []
    folds: list[int] = []
    take = folder.take

    def counting() -> Any:
        told = take()
        folds[-1] += sum(map(len, told.values()))
        return told

    preempted = count_preemptions(llm)
    for fold in (folder.fold, lambda *_: None):
        preempted.clear()
        folds.append(0)
        assert llm.reset_prefix_cache()
        with mock.patch.object(folder, "fold", fold), mock.patch.object(folder, "take", counting):
            runs.append(drive(llm, arrivals))
        assert len(preempted) >= 5
    assert folds[0] > 12 and not folds[1]
    with_folds, without = runs
    assert with_folds.keys() == without.keys()
    for (name, index), out in with_folds.items():
        want, what = without[name, index], f"{name}.{index}"
        if name == "7":  # left in the middle
            count = min(len(out.tokens), len(want.tokens))
            assert out.tokens[:count] == want.tokens[:count], what
            continue
        assert_same(what, out.tokens, out.depths, want.tokens, want.depths)
        for place, pair in enumerate(zip(out.logprobs, want.logprobs, strict=True)):
            assert abs(pair[0] - pair[1]) <= LOGPROB_TOLERANCE, f"{what}: token {place}: {pair}"


@pytest.mark.parametrize("seed", range(3))
def test_deep_tokens_after_folded_blocks_are_the_references(llm: LLM, seed: int) -> None:
    rng = random.Random(seed)
    prompt = [rng.randrange(256) for _ in range(rng.randint(1, 70))]
    depths = stretches(rng)
    out = generate_one(llm, prompt, greedy(TOKENS, {"exit_mode": "skip", "forced_depths": depths}))
    wanted = Reference(CHECKPOINT).generate(prompt, TOKENS, mode="skip", forced_depths=depths)
    margins = [wanted.margin(index) for index in range(TOKENS)]
    assert_same(f"{seed}", out.tokens, out.depths, wanted.tokens, wanted.depths, margins)
    for place, pair in enumerate(zip(out.logprobs, wanted.logprobs, strict=True)):
        assert abs(pair[0] - pair[1]) <= LOGPROB_TOLERANCE, f"token {place}: {pair}"


def test_a_block_has_the_pages_of_its_deepest_position(llm: LLM) -> None:
    """A block of the prompt has all; one at depth 1 one; the one that is written to has all."""
    depths = [1] * (BLOCK + 1) + [2] * BLOCK + [3] * BLOCK + [4]
    params = greedy(3 * BLOCK + 5, {"exit_mode": "skip", "forced_depths": depths})
    llm.llm_engine.add_request("held", {"prompt_token_ids": list(range(5, 5 + BLOCK))}, params)
    (request,) = scheduler_of(llm).requests.values()
    seen: dict[int, list[int]] = {}
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        if request.request_id in scheduler_of(llm).requests:
            seen[request.num_computed_tokens // BLOCK] = pages_by_loop(llm)
    # The last seen with so many full blocks; a step may have slots of a block ahead.
    assert [len(seen), *(seen[4][loop] for loop in range(LOOPS))] == [4, 5, 4, 3, 2]
