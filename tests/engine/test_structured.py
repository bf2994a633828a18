"""Grammars hold at every threshold: such a request takes one token per step, the others do not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from vllm import LLM
from vllm.sampling_params import StructuredOutputsParams

from tests.engine.cases import CHECKPOINTS
from tests.engine.checkpoints import with_byte_tokenizer
from tests.engine.compare import assert_same
from tests.engine.harness import assert_idle, engine, generate, generate_one, greedy
from tests.engine.mixes import SCHEMA

PROMPTS = [list(text.encode()) for text in ("a", "where?", "one, two, three", "x" * 40 + "y")]
DEPTH: list[dict[str, Any]] = [
    *({"exit_threshold": q, "exit_mode": "skip"} for q in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)),
    {"exit_threshold": 0.3, "exit_mode": "exact"},
    {"forced_depths": [1, 4, 2, 3]},
]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("structured") / "model"
    model = with_byte_tokenizer(CHECKPOINTS["t4-mha"], folder)
    with engine(model, skip_tokenizer_init=False) as llm:
        yield llm


def grammar(**kind: Any) -> dict[str, Any]:
    """Options of a request bound to a grammar; white space, of which JSON allows any, is dear."""
    return {
        "structured_outputs": StructuredOutputsParams(**kind),
        "detokenize": True,
        "ignore_eos": False,
        "logit_bias": dict.fromkeys(b" \t\r\n", -100.0),
    }


@pytest.mark.parametrize("depth", DEPTH, ids=str)
def test_json_schema_regex_and_choice_hold(llm: LLM, depth: dict[str, Any]) -> None:
    kinds = [
        grammar(json=SCHEMA),
        grammar(regex=r"[a-c]{3}-[0-9]{2}"),
        grammar(choice=["north", "north-east", "west"]),
    ]
    for prompt in PROMPTS:
        parameters = [greedy(64, depth, **kind) for kind in kinds]
        answer, match, choice = generate(llm, [prompt] * 3, parameters)
        value = json.loads(answer.text)
        assert set(value) == {"n", "ok"}
        assert re.fullmatch(r"[a-c]{3}-[0-9]{2}", match.text)
        assert choice.text in ("north", "north-east", "west")
        if depths := depth.get("forced_depths"):
            for out in (answer, match, choice):
                assert out.depths == [depths[i % 4] for i in range(len(out.tokens))]
    assert_idle(llm)


def test_free_requests_beside_a_grammar_are_what_they_are_alone(llm: LLM) -> None:
    requests = [(p, greedy(20, d)) for p in PROMPTS[:3] for d in DEPTH[::2]]
    bound = [(p, greedy(40, d, **grammar(json=SCHEMA))) for p in PROMPTS[:2] for d in DEPTH[1::3]]
    everyone = [*bound, *requests]
    alone = [generate_one(llm, prompt, params) for prompt, params in everyone]
    together = generate(llm, [p for p, _ in everyone], [params for _, params in everyone])
    for number, (out, expected) in enumerate(zip(together, alone, strict=True)):
        both = (out.tokens, out.depths, expected.tokens, expected.depths)
        assert_same(f"request {number}", *both)


def test_a_grammar_with_seeds_and_penalties_is_repeatable(llm: LLM) -> None:
    options = {"temperature": 1.0, "seed": 3, "presence_penalty": 0.4}
    params = greedy(64, {"exit_threshold": 0.3}, **grammar(json=SCHEMA), **options)
    first = generate_one(llm, PROMPTS[2], params)
    company = [greedy(30, {"forced_depths": [1]}, temperature=1.0, seed=s) for s in range(4)]
    again = generate(llm, [*PROMPTS, PROMPTS[2]], [*company, params])[-1]
    assert_same("again", again.tokens, again.depths, first.tokens, first.depths)
    json.loads(first.text)
