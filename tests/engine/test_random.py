"""Random checkpoints, requests and forced depths: the engine says what the reference says."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
from vllm import LLM

from tests.engine.checkpoints import write_random
from tests.engine.compare import LOGPROB_TOLERANCE, assert_cdf, assert_same, first_difference
from tests.engine.harness import assert_idle, engine, generate, greedy
from tests.engine.mixes import THRESHOLDS
from tests.reference.model import Reference

SHAPES = [
    {"loops": 1, "heads": 2, "kv_heads": 2, "head_dim": 32},
    {"loops": 2, "heads": 4, "kv_heads": 2, "head_dim": 64},
    {"loops": 3, "heads": 2, "kv_heads": 1, "head_dim": 80},
    {"loops": 4, "heads": 4, "kv_heads": 1, "head_dim": 96},
    {"loops": 5, "heads": 3, "kv_heads": 3, "head_dim": 128},
    {"loops": 6, "heads": 4, "kv_heads": 2, "head_dim": 32},
]
"""Every T from 1 to 6; GQA groups of 1, 2 and 4; every head size up to 128 but one."""

REQUESTS = 16
TOKENS = 14


@pytest.fixture(scope="module", params=SHAPES, ids=lambda s: f"T{s['loops']}-d{s['head_dim']}")
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LLM, Reference]]:
    shape: dict[str, int] = request.param
    folder = write_random(tmp_path_factory.mktemp("random") / "model", **shape, seed=shape["loops"])
    with engine(folder, max_model_len=128, blocks=127) as llm:
        yield llm, Reference(folder)


def compare(
    model: tuple[LLM, Reference], prompts: list[list[int]], depth: list[dict[str, Any]]
) -> None:
    """Run all requests in one batch and hold each against the reference."""
    llm, reference = model
    outputs = generate(llm, prompts, [greedy(TOKENS, fields) for fields in depth])
    excused = 0
    for number, (prompt, fields, out) in enumerate(zip(prompts, depth, outputs, strict=True)):
        expected = reference.generate(
            prompt,
            TOKENS,
            threshold=fields.get("exit_threshold", 1.0),
            rule=fields.get("exit_rule", "gate"),
            mode=fields.get("exit_mode", "skip"),
            min_loops=fields.get("min_loops", 1),
            max_loops=fields.get("max_loops"),
            forced_depths=fields.get("forced_depths"),
        )
        margins = [expected.margin(index) for index in range(TOKENS)]
        both = (out.tokens, out.depths, expected.tokens, expected.depths)
        excused += not assert_same(f"request {number} {fields}", *both, margins)
        alike = first_difference(*both)
        alike = TOKENS if alike is None else alike
        assert_cdf(f"request {number} {fields}", out.exit_cdf[:alike], expected.exit_cdf[:alike])
        for index in range(alike):
            off = abs(out.logprobs[index] - expected.logprobs[index])
            assert off <= LOGPROB_TOLERANCE, f"request {number} {fields}: token {index} off {off}"
    assert excused <= 2, f"{excused} of {len(prompts)} requests excused as near ties"
    assert_idle(llm)


def random_prompts(rng: random.Random) -> list[list[int]]:
    """Prompts of 1 to 80 tokens, some of exactly one block."""
    lengths = [1, 31, 32, 33, 64, *(rng.randint(1, 80) for _ in range(REQUESTS - 5))]
    return [[rng.randrange(128) for _ in range(length)] for length in lengths]


def test_depths_forced_per_token(model: tuple[LLM, Reference]) -> None:
    rng = random.Random(model[1].loops)
    prompts = random_prompts(rng)
    depth = [
        {
            "forced_depths": [
                rng.randint(1, model[1].loops) for _ in range(rng.randint(1, TOKENS))
            ],
            "exit_mode": rng.choice(["skip", "exact"]),
        }
        for _ in prompts
    ]
    compare(model, prompts, depth)


def test_thresholds_and_limits(model: tuple[LLM, Reference]) -> None:
    rng = random.Random(100 + model[1].loops)
    prompts = random_prompts(rng)
    depth = []
    for _ in prompts:
        low = rng.randint(1, model[1].loops)
        rule = rng.choice(list(THRESHOLDS))
        depth.append(
            {
                "exit_rule": rule,
                "exit_threshold": rng.choice(THRESHOLDS[rule]),
                "exit_mode": rng.choice(["skip", "exact"]),
                "min_loops": low,
                "max_loops": rng.randint(low, model[1].loops),
            }
        )
    compare(model, prompts, depth)
