"""Over HTTP too, whatever requests ask for: an answer in a crowd is the answer alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.server.live import KEY, Live

pytestmark = pytest.mark.slow

REQUESTS = 64
QUESTIONS = (
    "What is 904821 + 583397?",
    "What is (((((3+4)*2)-1)*3)+2)-4 mod 5?",
    "Who are you?",
    "What is 17 + 25?",
)
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["n"],
    "additionalProperties": False,
}
TOLERANCE = 2e-3
"""Of log-probabilities (text of four digits or more) and of the gate's CDF, sent to four digits."""

Body = dict[str, Any]


def ids(rng: random.Random, count: int) -> list[int]:
    return rng.sample(range(5, 500), count)


COMMON: dict[str, Callable[[random.Random], Body]] = {
    "sampling": lambda rng: {"temperature": 1.0, "seed": rng.randrange(1 << 30)},
    "narrow": lambda rng: {
        "temperature": 0.8,
        "seed": rng.randrange(1 << 30),
        **rng.choice([{"top_p": 0.8}, {"top_k": 9}, {"min_p": 0.05}]),
    },
    "penalties": lambda rng: rng.choice(
        [{"presence_penalty": 1.0}, {"frequency_penalty": 0.7}, {"repetition_penalty": 1.2}]
    ),
    "bias": lambda rng: {"logit_bias": {str(token): 3 for token in ids(rng, 3)}},
    "min_tokens": lambda rng: {"min_tokens": rng.randint(1, 12)},
    "bad words": lambda rng: {"bad_words": ["1", "is"]},
    "allowed": lambda rng: {"allowed_token_ids": ids(rng, 60)},
    "stop": lambda rng: {"stop": ["7", "m"]},
    "stop ids": lambda rng: {"stop_token_ids": ids(rng, 30)},
    "budget": lambda rng: {"thinking_token_budget": rng.randint(0, 3)},
    "regex": lambda rng: {"structured_outputs": {"regex": "[a-c]{3}-[0-9]{2}"}},
    "choice": lambda rng: {"structured_outputs": {"choice": ["north", "north-east", "west"]}},
    "n": lambda rng: {"n": 3, "temperature": 1.0, "seed": rng.randrange(1 << 30)},
    "prompt logprobs": lambda rng: {"prompt_logprobs": rng.randint(0, 2)},
}
CHAT: dict[str, Callable[[random.Random], Body]] = {
    "logprobs": lambda rng: {"logprobs": True, "top_logprobs": rng.choice([0, 1, 5])},
    "named": lambda rng: {"logprobs": True, "logprob_token_ids": ids(rng, rng.randint(1, 4))},
    "json": lambda rng: {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": SCHEMA},
        }
    },
    "echo": lambda rng: {"echo": True, "add_generation_prompt": False},
}
COMPLETIONS: dict[str, Callable[[random.Random], Body]] = {
    "logprobs": lambda rng: {"logprobs": rng.choice([0, 1, 5])},
    "echo": lambda rng: {"echo": True, "logprobs": rng.choice([None, 2])},
    "several": lambda rng: {"prompt": [list(QUESTIONS[0].encode()), [7, 9, 50]]},
    "a thought": lambda rng: {
        "prompt": [3, 50, 60, 70],
        "thinking_token_budget": rng.randint(0, 3),
        "skip_special_tokens": False,
    },
}
DEPTH: list[Body] = [
    {},
    {"exit_threshold": 0.5},
    {"exit_threshold": 0.2, "min_loops": 2},
    {"exit_threshold": 0.3, "exit_mode": "lossless"},
    {"exit_threshold": 0.3, "exit_mode": "exact"},
    {"max_loops": 2},
    {"vllm_xargs": {"forced_depths": [1, 3, 2, 4, 1]}},
    {"depth_preset": "fast"},
]


def random_body(rng: random.Random, model: str) -> tuple[str, Body]:
    """A path and a body with one to three features."""
    chat = rng.random() < 0.5
    own = CHAT if chat else COMPLETIONS
    body: Body = {"model": model, "max_tokens": 14, "temperature": 0, "return_depths": True}
    body |= {"return_token_ids": True, "return_exit_cdf": rng.random() < 0.5}
    if chat:
        body["messages"] = [{"role": "user", "content": rng.choice(QUESTIONS)}]
    else:
        body["prompt"] = rng.choice(QUESTIONS)
    features = rng.sample(sorted({**COMMON, **own}), rng.randint(1, 3))
    for name in features:
        body |= own[name](rng) if name in own else COMMON[name](rng)
    body |= rng.choice(DEPTH)
    return f"/v1/{'chat/' if chat else ''}completions", body


def assert_equal(where: str, got: Any, want: Any) -> None:
    """Equal JSON, numbers within the order of summation."""
    if isinstance(want, float) and isinstance(got, float):
        assert got == pytest.approx(want, abs=TOLERANCE, rel=1e-4), where
    elif isinstance(want, dict) and isinstance(got, dict):
        assert got.keys() == want.keys(), where
        for key in want:
            assert_equal(f"{where}.{key}", got[key], want[key])
    elif isinstance(want, list) and isinstance(got, list):
        assert len(got) == len(want), where
        for index, pair in enumerate(zip(got, want, strict=True)):
            assert_equal(f"{where}[{index}]", *pair)
    else:
        assert got == want, f"{where}: {got!r}, alone {want!r}"


def told(answer: httpx.Response, depth: bool) -> Body:
    """What an answer says, without its name and time; `depth`: and of its depths."""
    body = answer.json()
    kept = ("choices", "usage", "error", "prompt_logprobs")
    body = {key: body[key] for key in kept if key in body}
    if "usage" in body:
        # How much the prefix cache had is another matter.
        body["usage"].pop("prompt_tokens_details", None)
    if not depth:
        # Where a token is drafted is the server's to say, and may change; never the token.
        for part in (body.get("usage", {}), *body.get("choices", ())):
            for name in ("depth", "depths", "exit_cdf"):
                part.pop(name, None)
    return body


def test_an_answer_in_a_crowd_is_the_answer_alone(live: Live) -> None:
    rng = random.Random(12)
    requests = [random_body(rng, live.model) for _ in range(REQUESTS)]
    alone = [live.http.post(path, json=body) for path, body in requests]
    answered = [answer.status_code == 200 for answer in alone]
    for (path, body), answer in zip(requests, alone, strict=True):
        assert answer.status_code in (200, 400), (path, body, answer.text)
    assert sum(answered) > 0.7 * REQUESTS, [a.text for a in alone if a.status_code != 200]

    async def crowd() -> list[httpx.Response]:
        headers = {"Authorization": f"Bearer {KEY}"}
        limits = httpx.Limits(max_connections=REQUESTS)
        async with httpx.AsyncClient(
            base_url=live.url, headers=headers, limits=limits, timeout=120
        ) as http:
            return await asyncio.gather(*(http.post(path, json=body) for path, body in requests))

    for (path, body), one, other in zip(requests, alone, asyncio.run(crowd()), strict=True):
        what = f"{path} {body}"
        assert other.status_code == one.status_code, (what, other.text)
        says = any(field in body for fields in DEPTH for field in fields)
        assert_equal(what, told(other, says), told(one, says))
