"""Random requests that ask for anything vLLM offers, and what an answer is compared in."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

from tests.engine.compare import LOGPROB_TOLERANCE
from tests.engine.harness import Output

LOOPS, VOCAB = 4, 256
THINK = 3
LETTERS = "abcdefgh"
SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
        "ok": {"type": "boolean"},
    },
    "required": ["n", "ok"],
    "additionalProperties": False,
}

Options = dict[str, Any]


def tokens(rng: random.Random, count: int) -> list[int]:
    """Distinct token ids that are not special."""
    return rng.sample(range(5, VOCAB), count)


def sampled(rng: random.Random) -> Options:
    narrowed: list[Options] = [
        {},
        {"top_p": 0.8},
        {"top_k": 12},
        {"min_p": 0.05},
        {"top_k": 40, "top_p": 0.9, "min_p": 0.01},
    ]
    options = {"temperature": rng.choice([0.5, 1.0, 1.5]), "seed": rng.randrange(1 << 30)}
    if rng.random() < 0.2:
        options["n"] = rng.randint(2, 3)
    return options | rng.choice(narrowed)


def grammar(rng: random.Random) -> Options:
    kind: Options = rng.choice(
        [
            {"json": SCHEMA},
            {"regex": r"[a-c]{3}-[0-9]{2}"},
            {"choice": ["north", "north-east", "west"]},
        ]
    )
    # Of white space JSON allows any amount.
    dear = dict.fromkeys(b" \t\r\n", -100.0)
    return {"structured_outputs": StructuredOutputsParams(**kind), "logit_bias": dear}


FEATURES: dict[str, tuple[float, Callable[[random.Random], Options]]] = {
    "sampling": (0.4, sampled),
    "penalties": (
        0.3,
        lambda rng: rng.choice(
            [
                {"presence_penalty": 1.0},
                {"frequency_penalty": 0.7},
                {"repetition_penalty": 1.3},
                {"presence_penalty": 0.3, "frequency_penalty": -0.5, "repetition_penalty": 0.9},
            ]
        ),
    ),
    "bias": (
        0.2,
        lambda rng: {"logit_bias": {t: rng.choice([-4.0, 3.0]) for t in tokens(rng, 3)}},
    ),
    "allowed": (0.15, lambda rng: {"allowed_token_ids": tokens(rng, 40)}),
    "bad words": (0.15, lambda rng: {"bad_words": [*rng.sample(LETTERS, 2), "ab"]}),
    "logprobs": (0.3, lambda rng: {"logprobs": rng.choice([0, 1, 3, 7, -1])}),
    "named logprobs": (
        0.2,
        lambda rng: {"logprob_token_ids": tokens(rng, rng.randint(1, 5)), "logprobs": None},
    ),
    "prompt logprobs": (0.1, lambda rng: {"prompt_logprobs": rng.choice([0, 2])}),
    "budget": (
        0.25,
        lambda rng: (
            {"thinking_token_budget": rng.randint(0, 4)}
            # Half of them open a thought after each that they had to end.
            | rng.choice([{}, {"logit_bias": {THINK: 100.0}}])
        ),
    ),
    "grammar": (0.15, grammar),
    "stop string": (0.15, lambda rng: {"stop": rng.sample(LETTERS, 2)}),
    "repetition": (
        0.1,
        lambda rng: {
            "repetition_detection": RepetitionDetectionParams(
                max_pattern_size=3, min_pattern_size=1, min_count=2
            )
        },
    ),
    "no reading": (0.1, lambda rng: {"skip_reading_prefix_cache": True}),
    "end": (0.1, lambda rng: {"ignore_eos": False}),
}
"""Feature -> how often a request has it, and the sampling options it brings."""


THRESHOLDS = {
    "gate": [0.0, 0.2, 0.4, 0.6, 0.8, 1.0],
    "margin": [0.0, 0.005, 0.01, 0.02, 0.04, 1.0],
    "delta": [0.0, 0.55, 0.65, 0.75, 0.85, 2.0],
}
"""By exit rule, around what a random checkpoint's loops read."""


def gate_fields(rng: random.Random) -> Options:
    """Depth controls of the modes whose depths are the exit rule's, by the gate."""
    return depth_fields(rng, ("skip", "skip", "exact"), ("gate",))


def depth_fields(
    rng: random.Random,
    modes: Sequence[str] = ("skip", "skip", "exact", "lossless", "shared"),
    rules: Sequence[str] = tuple(THRESHOLDS),
) -> Options:
    """Depth controls of one of `modes`: forced, or by one of `rules`."""
    fields: Options = {"exit_mode": rng.choice(modes)}
    if rng.random() < 0.4:
        depths = [rng.randint(1, LOOPS) for _ in range(rng.randint(1, 9))]
        return fields | {"forced_depths": depths}
    fields["exit_rule"] = rule = rng.choice(rules)
    fields["exit_threshold"] = rng.choice(THRESHOLDS[rule])
    if rng.random() < 0.3:
        fields |= rng.choice(
            [{"min_loops": rng.randint(1, LOOPS)}, {"max_loops": rng.randint(1, 3)}]
        )
    return fields


def random_request(
    rng: random.Random,
    prefix: list[int],
    depth: Callable[[random.Random], Options] = depth_fields,
) -> tuple[list[int], Options]:
    """A prompt, now and then with the common prefix or in the middle of a thought, and options."""
    prompt = tokens(rng, rng.choice([1, 3, 8, 24, 29, 31, 40]))
    if rng.random() < 0.4:
        prompt = prefix + prompt
    options: Options = {
        "max_tokens": rng.randint(1, 14),
        "temperature": 0.0,
        "ignore_eos": True,
        "extra_args": depth(rng),
    }
    for likely, draw in FEATURES.values():
        if rng.random() < likely:
            options |= draw(rng)
    if "thinking_token_budget" in options:
        prompt.insert(rng.randint(max(0, len(prompt) - 2), len(prompt)), THINK)
    if "structured_outputs" in options:
        # A grammar cannot go on where what it needs is forbidden, or a thought must end.
        for other in ("allowed_token_ids", "bad_words", "thinking_token_budget", "stop"):
            options.pop(other, None)
        options["max_tokens"] = 14
    return prompt, options


def sampling(options: Options) -> SamplingParams:
    return SamplingParams(**options)


def assert_same_values(what: str, out: Output, alone: Output) -> None:
    """Log-probabilities of the same tokens, within the order of summation."""
    for kind in ("entries", "prompt_entries"):
        ours, theirs = getattr(out, kind), getattr(alone, kind)[: len(getattr(out, kind))]
        for place, (got, want) in enumerate(zip(ours, theirs, strict=True)):
            where = f"{what}: {kind} of token {place}"
            assert len(got) == len(want), f"{where}: {got}, alone {want}"
            # Of impossible ones (a grammar's) it is chance which are among the likeliest.
            got, want = possible(got), possible(want)
            # The last of the likeliest may be another one where two are as likely.
            for token in got.keys() & want.keys():
                off = abs(got[token] - want[token])
                assert off <= LOGPROB_TOLERANCE, f"{where}: {got[token]}, alone {want[token]}"
            assert len(got.keys() ^ want.keys()) <= 2, f"{where}: {got}, alone {want}"


def possible(entries: dict[int, float]) -> dict[int, float]:
    return {token: value for token, value in entries.items() if value != -math.inf}
