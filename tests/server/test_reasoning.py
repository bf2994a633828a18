"""Reasoning is told from the answer by token id, in streams and in complete answers alike."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from vllm.parser.parser_manager import ParserManager

from ouro_runtime.engine.reasoning import LateText, OuroReasoningParser, reading_ids
from ouro_runtime.training.tokenizer import train_tokenizer

BOUNDARY = "<|im_end|>"
PROMPT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
TOOL = [SimpleNamespace(type="function", function=SimpleNamespace(name="f", parameters={}))]

# (prompt, generated, reasoning, content)
TURNS = [
    (PROMPT, "plain answer", None, "plain answer"),
    (PROMPT, "<think>why not</think>because", "why not", "because"),
    (PROMPT, "<think>cut off", "cut off", None),
    (PROMPT, "<think></think>x", None, "x"),
    (PROMPT + "<think>\n", "why not</think>because", "why not", "because"),
    (PROMPT + "<think>\n", "never closed", "never closed", None),
    (PROMPT + "<think>\n\n</think>", "because", None, "because"),
    ("<|im_start|>assistant\n<think>old</think>x<|im_end|>\n" + PROMPT, "new", None, "new"),
    (PROMPT, "", None, None),
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    texts = ["user\nhi assistant\nwhy not because plain answer never closed cut off"] * 3
    return PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(texts, 300),
        clean_up_tokenization_spaces=False,
        eos_token=BOUNDARY,
    )


def request(**fields: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **({"tools": None, "tool_choice": "none", "include_reasoning": True} | fields)
    )


def parser(tokenizer: Any, tools: bool = False) -> Any:
    composed = ParserManager.get_parser(
        reasoning_parser_name="ouro",
        tool_parser_name="hermes" if tools else None,
        enable_auto_tools=tools,
        tokenizer=tokenizer,
    )
    return reading_ids(composed)(tokenizer, TOOL if tools else None)


def complete(tokenizer: Any, prompt: str, ids: list[int]) -> tuple[str | None, str | None]:
    made = parser(tokenizer)
    made.set_prompt_token_ids(tokenizer.encode(prompt))
    text = tokenizer.decode(ids, skip_special_tokens=False)
    reasoning, content, _ = made.parse(text, request(), model_output_token_ids=ids)
    return reasoning, content


def streamed(
    tokenizer: Any, prompt: str, ids: list[int], rng: random.Random, tools: bool = False
) -> tuple[str | None, str | None]:
    """Deltas of one to four tokens, their text late by up to five characters."""
    made = parser(tokenizer, tools)
    wanted = request(tools=TOOL, tool_choice="auto") if tools else request()
    prompt_ids = tokenizer.encode(prompt)
    reasoning = content = ""
    sent = start = 0
    while start <= len(ids):
        end = min(len(ids), start + rng.randint(1, 4))
        finished = end == len(ids)
        text = tokenizer.decode(ids[:end], skip_special_tokens=False)
        upto = len(text) if finished else max(sent, len(text) - rng.randint(0, 5))
        delta = made.parse_delta(
            text[sent:upto], ids[start:end], wanted, prompt_ids, finished=finished
        )
        if delta is not None:
            reasoning += delta.reasoning or ""
            content += delta.content or ""
        sent, start = upto, end
        if finished:
            break
    return reasoning or None, content or None


@pytest.mark.parametrize(("prompt", "generated", "reasoning", "content"), TURNS)
def test_a_turn_is_split_alike_in_streams_and_complete_answers(
    tokenizer: Any, prompt: str, generated: str, reasoning: str | None, content: str | None
) -> None:
    ids = tokenizer.encode(generated)
    assert complete(tokenizer, prompt, ids) == (reasoning, content)
    for seed in range(20):
        assert streamed(tokenizer, prompt, ids, random.Random(seed)) == (reasoning, content)


@pytest.mark.parametrize(
    ("generated", "content"),
    [
        (BOUNDARY * 9, None),
        (f"plain{BOUNDARY}{BOUNDARY} answer{BOUNDARY}", "plain answer"),
        (f"{BOUNDARY}why{BOUNDARY * 4}not{BOUNDARY}because{BOUNDARY * 2} x", "whynotbecause x"),
    ],
)
def test_boundaries_in_late_text_are_no_content(
    tokenizer: Any, generated: str, content: str | None
) -> None:
    """With `ignore_eos` a model goes on after the end of its turn."""
    ids = tokenizer.encode(generated)
    assert complete(tokenizer, PROMPT, ids) == (None, content)
    for seed in range(60):
        assert streamed(tokenizer, PROMPT, ids, random.Random(seed)) == (None, content), seed


def test_a_stop_string_cuts_off_the_ids_behind_it(tokenizer: Any) -> None:
    """The last delta has text up to the stop string only; a tag after it has no part in it."""
    late = LateText(tokenizer)
    ids = tokenizer.encode("why not</think>because")
    at = ids.index(4)
    assert late.add("", ids[:at], False) == ("", [])
    text, ready = late.add("why no", ids[at:], True)
    assert text == "why no"
    assert 4 not in ready and len(ready) < at


def test_text_that_its_ids_do_not_spell_comes_as_it_is(tokenizer: Any) -> None:
    late = LateText(tokenizer)
    ids = tokenizer.encode("plain answer")
    assert late.add("PL", ids[:1], False) == ("PL", ids[:1])
    assert late.add("AIN", ids[1:], False) == ("AIN", ids[1:])


def test_text_that_spells_a_tag_is_no_tag(tokenizer: Any) -> None:
    ids = [i for c in "<think>no</think>" for i in tokenizer.encode(c)]
    assert not {3, 4} & set(ids)
    assert complete(tokenizer, PROMPT, ids) == (None, "<think>no</think>")
    for seed in range(20):
        got = streamed(tokenizer, PROMPT, ids, random.Random(seed))
        assert got == (None, "<think>no</think>")


def test_with_tools_content_goes_to_the_tool_parser(tokenizer: Any) -> None:
    for generated in ("plain answer", "<think>why not</think>because"):
        ids = tokenizer.encode(generated)
        expected = complete(tokenizer, PROMPT, ids)
        assert streamed(tokenizer, PROMPT, ids, random.Random(0), tools=True) == expected


def test_reasoning_tokens_are_counted_from_the_prompt_on(tokenizer: Any) -> None:
    made = OuroReasoningParser(tokenizer)
    ids = tokenizer.encode("why not</think>because")
    made.begin(tokenizer.encode(PROMPT + "<think>\n"))
    assert made.count_reasoning_tokens(ids) == ids.index(4)
    made = OuroReasoningParser(tokenizer)
    made.begin(tokenizer.encode(PROMPT))
    assert made.count_reasoning_tokens(ids) == 0
    assert made.count_reasoning_tokens([3, 9, 9, 4, 9]) == 2


def test_a_grammar_waits_only_while_reasoning_is_open(tokenizer: Any) -> None:
    ended = OuroReasoningParser(tokenizer).is_reasoning_end
    assert ended(tokenizer.encode(PROMPT))
    assert not ended(tokenizer.encode(PROMPT + "<think>\n"))
    assert ended(tokenizer.encode(PROMPT + "<think>\nwhy</think>"))
    assert ended(tokenizer.encode("<|im_start|>user\n<think><|im_end|>\n" + PROMPT))


def test_a_tokenizer_without_the_tags_is_refused(tokenizer: Any) -> None:
    class Bare:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    with pytest.raises(ValueError, match="</think>"):
        OuroReasoningParser(Bare())


def test_parsers_that_are_not_ours_are_left_alone() -> None:
    class Other:
        reasoning_parser_cls = None

    assert reading_ids(Other) is Other
