"""A pool that holds the longest request at one loop only."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from vllm import LLM

from ouro_runtime.config import DepthError
from tests.engine.cases import CHECKPOINTS
from tests.engine.compare import assert_same
from tests.engine.harness import BLOCK, assert_idle, engine, generate, generate_one, greedy
from tests.reference.model import Reference

CHECKPOINT, LOOPS = CHECKPOINTS["t4-mha"], 4
PAGES = 8
LENGTH = PAGES * BLOCK


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    options = {"max_model_len": LENGTH, "num_gpu_blocks_override": PAGES + 1, "max_num_seqs": 4}
    with engine(CHECKPOINT, **options) as llm:
        yield llm
        assert_idle(llm)


def random_tokens(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(count)]


@pytest.mark.parametrize(
    ("depth", "total"),
    [
        ({"exit_threshold": 1.0}, 2 * BLOCK - 6),
        ({"max_loops": 2}, 4 * BLOCK - 6),
        ({"max_loops": 1}, LENGTH),
        ({"exit_mode": "shared"}, 5 * BLOCK - 6),
    ],
    ids=str,
)
def test_a_request_ends_where_the_pool_does(llm: LLM, depth: dict[str, Any], total: int) -> None:
    prompt = random_tokens(1, 20)
    out = generate_one(llm, prompt, greedy(LENGTH - 20, depth))
    assert (len(prompt) + len(out.tokens), out.finish_reason) == (total, "length")
    wanted = Reference(CHECKPOINT).generate(
        prompt,
        len(out.tokens),
        mode=depth.get("exit_mode", "skip"),
        max_loops=depth.get("max_loops"),
    )
    margins = [wanted.margin(index) for index in range(len(out.tokens))]
    assert_same(f"{depth}", out.tokens, out.depths, wanted.tokens, wanted.depths, margins)


def test_a_prompt_that_does_not_fit_is_refused_and_fits_with_fewer_loops(llm: LLM) -> None:
    prompt = random_tokens(2, 3 * BLOCK)
    with pytest.raises(DepthError, match="96 tokens at 4 loops does not fit") as caught:
        generate(llm, [prompt], greedy(4, {"exit_threshold": 1.0}))
    assert caught.value.param == "prompt"
    with pytest.raises(DepthError, match="does not fit"):
        generate(llm, [prompt], greedy(4, {"exit_mode": "shared"}))
    out = generate_one(llm, prompt, greedy(4, {"max_loops": 2}))
    wanted = Reference(CHECKPOINT).generate(prompt, 4, max_loops=2, mode="skip")
    assert_same("capped", out.tokens, out.depths, wanted.tokens, wanted.depths)


def test_a_pool_too_small_at_one_loop_does_not_start() -> None:
    with (
        pytest.raises(ValueError, match="To serve at least one request"),
        engine(CHECKPOINT, max_model_len=LENGTH, num_gpu_blocks_override=PAGES),
    ):
        pass
