"""A real `ouro-serve` with the shipped checkpoint, asked through the official client."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import AutoTokenizer

from ouro_server.checkpoint import shipped
from tests.server.asking import ASK, DEFAULT, FULL, chat, check
from tests.server.live import LOOPS, Live

pytestmark = pytest.mark.slow

WORD = {"65": 100}
"""A logit bias under which every token is this one."""

VISIBLE = {str(special): -100 for special in range(5)}
"""A logit bias under which every token has text."""


def test_chat_answers_with_depths(live: Live, depth: dict[str, Any]) -> None:
    answer = chat(live, depth, logit_bias=VISIBLE)
    assert answer.choices[0].message.content
    assert answer.usage.prompt_tokens > 0


def test_depths_come_only_when_asked_for(live: Live) -> None:
    answer = live.client.chat.completions.create(
        model=live.model, messages=ASK, max_tokens=4, extra_body=FULL
    )
    assert "depths" not in answer.choices[0].model_dump()
    assert answer.usage.depth["loops_run"] == LOOPS * answer.usage.completion_tokens


def test_a_request_that_says_nothing_gets_the_full_depth_answer_with_drafts(live: Live) -> None:
    hard = [{"role": "user", "content": "What is 904821 + 583397?"}]
    drafted = 0
    for fields in ({}, {"n": 3, "temperature": 1.0, "seed": 5}, {"logprobs": True}):
        default, full = (chat(live, depth, hard, **fields) for depth in (DEFAULT, FULL))
        for one, other in zip(default.choices, full.choices, strict=True):
            assert one.message.content == other.message.content
            assert one.finish_reason == other.finish_reason
        drafted += default.usage.depth["drafts_right"]
        assert full.usage.depth["drafts_made"] == 0
    assert drafted > 0


def streamed(live: Live, fields: dict[str, Any], name: str) -> list[Any]:
    """What a stream of `chat`'s answer says of every token under `name`."""
    chunks = live.client.chat.completions.create(
        model=live.model,
        messages=ASK,
        max_tokens=16,
        temperature=0,
        stream=True,
        extra_body=fields,
    )
    parts = [part for chunk in chunks for part in chunk.choices]
    return [entry for part in parts for entry in getattr(part, name, None) or []]


def test_the_gates_cdf_is_as_long_as_the_depth_and_the_same_in_a_stream(
    live: Live, depth: dict[str, Any]
) -> None:
    asked = {"return_exit_cdf": True}
    choice = chat(live, depth, extra_body=asked).choices[0]
    assert [len(cdf) for cdf in choice.exit_cdf] == choice.depths
    for cdf in choice.exit_cdf:
        assert cdf == sorted(cdf)
        assert cdf[0] >= 0
        assert cdf[-1] == 1 if len(cdf) == LOOPS else cdf[-1] <= 1
        assert cdf[-1] >= depth.get("exit_threshold", 1)
    assert streamed(live, depth | asked, "exit_cdf") == choice.exit_cdf


def test_what_each_loop_would_have_said_is_the_same_in_a_stream(
    live: Live, depth: dict[str, Any]
) -> None:
    asked = {"return_loops": 3}
    choice = chat(live, depth, extra_body=asked).choices[0]
    assert [len(token) for token in choice.loops] == choice.depths
    last = [token[-1][0] for token in choice.loops]
    assert "".join(said["token"] for said in last).startswith(choice.message.content)
    values = [[said["logprob"] for said in loop] for token in choice.loops for loop in token]
    assert all(len(loop) == 3 and loop == sorted(loop, reverse=True) for loop in values)
    ids, in_stream = (
        [[[said["token_id"] for said in loop] for loop in token] for token in loops]
        for loops in (choice.loops, streamed(live, depth | asked, "loops"))
    )
    assert in_stream == ids


def test_loops_are_cut_with_the_text_at_a_stop_string(live: Live) -> None:
    whole = live.client.completions.create(
        model=live.model, prompt="2 + 3 =", max_tokens=8, temperature=0, logit_bias=WORD
    )
    stop = whole.choices[0].text[:1]
    answer = live.client.completions.create(
        model=live.model,
        prompt="2 + 3 =",
        max_tokens=8,
        temperature=0,
        stop=stop,
        logit_bias=WORD,
        extra_body={"return_loops": 1, "return_depths": True},
    )
    assert len(answer.choices[0].loops) == len(answer.choices[0].depths)
    assert len(answer.choices[0].depths) == answer.usage.completion_tokens


def test_a_threshold_of_zero_leaves_at_the_first_loop(live: Live) -> None:
    depths = chat(live, {"exit_threshold": 0}).choices[0].depths
    assert set(depths) == {1}


def test_loop_limits_bound_every_depth(live: Live) -> None:
    limited = {"exit_threshold": 0, "min_loops": 2}
    assert set(chat(live, limited).choices[0].depths) == {2}
    assert set(chat(live, {"max_loops": 3}).choices[0].depths) == {3}


def test_exact_mode_claims_no_saving(live: Live) -> None:
    extra = {"exit_threshold": 0.0, "exit_mode": "exact", "return_depths": True}
    answer = live.client.chat.completions.create(
        model=live.model, messages=ASK, max_tokens=8, temperature=0, extra_body=extra
    )
    check([answer.choices[0].depths], answer.usage, extra, mode="exact")
    assert answer.usage.depth["loops_skipped"] == 0


def test_forced_depths_are_taken_from_xargs(live: Live) -> None:
    forced = {"vllm_xargs": {"forced_depths": [3, 1, 2]}, "ignore_eos": True}
    depths = chat(live, forced, max_tokens=7).choices[0].depths
    assert depths == [3, 1, 2, 3, 1, 2, 3]


def test_a_stream_loses_and_doubles_nothing(live: Live, depth: dict[str, Any]) -> None:
    whole = chat(live, depth)
    text, depths, usage = "", [], None
    for chunk in live.client.chat.completions.create(
        model=live.model,
        messages=ASK,
        max_tokens=16,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=depth | {"return_depths": True},
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            depths += getattr(choice, "depths", None) or []
    assert text == (whole.choices[0].message.content or "")
    assert depths == whole.choices[0].depths
    check([depths], usage, depth)


def test_three_choices_have_depths_each(live: Live, depth: dict[str, Any]) -> None:
    answer = chat(live, depth, n=3, temperature=1.0, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    streamed: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for chunk in live.client.chat.completions.create(
        model=live.model,
        messages=ASK,
        max_tokens=16,
        n=3,
        temperature=1.0,
        seed=1,
        stream=True,
        extra_body=depth | {"return_depths": True},
    ):
        for choice in chunk.choices:
            streamed[choice.index] += getattr(choice, "depths", None) or []
    assert streamed == {choice.index: choice.depths for choice in answer.choices}


def test_a_stop_string_ends_the_text_and_keeps_depths_aligned(
    live: Live, depth: dict[str, Any]
) -> None:
    free = {"logit_bias": VISIBLE, "extra_body": {"return_token_ids": True}}
    text = chat(live, depth, **free).choices[0].message.content
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    choice = chat(live, depth, stop=[stop], **free).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.message.content == text[: text.index(stop)]
    assert len(choice.depths) == len(choice.token_ids)


def test_logprobs_are_as_many_as_depths(live: Live, depth: dict[str, Any]) -> None:
    choice = chat(live, depth, logprobs=True, top_logprobs=2).choices[0]
    assert len(choice.logprobs.content) == len(choice.depths)
    assert all(entry.top_logprobs[0].logprob <= 0 for entry in choice.logprobs.content)


def test_a_seed_repeats_text_and_depths(live: Live, depth: dict[str, Any]) -> None:
    first, second = (chat(live, depth, temperature=1.0, seed=7).choices[0] for _ in range(2))
    assert first.message.content == second.message.content
    assert first.depths == second.depths


def test_logit_bias_rules_at_every_depth(live: Live, depth: dict[str, Any]) -> None:
    free = {"return_token_ids": True}
    choice = chat(live, depth, logit_bias=WORD, max_tokens=5, extra_body=free).choices[0]
    assert choice.token_ids == [65] * 5


@pytest.fixture(scope="module")
def no_spaces() -> dict[str, float]:
    """A logit bias against tokens of nothing but whitespace. A tool call's grammar lets spaces
    stand between JSON's parts, and so small a model never ends them."""
    tokenizer = AutoTokenizer.from_pretrained(shipped())
    ids = range(len(tokenizer))
    return {str(i): -100 for i in ids if tokenizer.decode([i]).isspace()}


ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"sign": {"enum": ["plus", "minus"]}},
            "required": ["sign"],
            "additionalProperties": False,
        },
    },
}


def test_a_tool_call_has_valid_arguments(
    live: Live, depth: dict[str, Any], no_spaces: dict[str, float]
) -> None:
    choice = chat(
        live,
        depth,
        tools=[ADD],
        tool_choice={"type": "function", "function": {"name": "add"}},
        max_tokens=120,
        logit_bias=no_spaces,
    ).choices[0]
    (call,) = choice.message.tool_calls
    assert call.function.name == "add"
    assert json.loads(call.function.arguments)["sign"] in ("plus", "minus")


def test_a_streamed_tool_call_keeps_its_depths(
    live: Live, depth: dict[str, Any], no_spaces: dict[str, float]
) -> None:
    arguments, depths, usage = "", [], None
    for chunk in live.client.chat.completions.create(
        model=live.model,
        messages=ASK,
        tools=[ADD],
        tool_choice="required",
        max_tokens=120,
        logit_bias=no_spaces,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=depth | {"return_depths": True},
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            depths += getattr(choice, "depths", None) or []
            for call in choice.delta.tool_calls or []:
                arguments += call.function.arguments or ""
    assert json.loads(arguments)["sign"] in ("plus", "minus")
    check([depths], usage, depth)


def test_tools_may_be_left_alone(live: Live, depth: dict[str, Any]) -> None:
    choice = chat(live, depth, tools=[ADD], tool_choice="none").choices[0]
    assert not choice.message.tool_calls


def test_a_json_schema_is_obeyed(live: Live, depth: dict[str, Any]) -> None:
    schema = ADD["function"]["parameters"]
    answer = chat(
        live,
        depth,
        max_tokens=64,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "sign", "schema": schema},
        },
    )
    assert json.loads(answer.choices[0].message.content)["sign"] in ("plus", "minus")


def test_a_chat_goes_on_for_a_second_turn(live: Live, depth: dict[str, Any]) -> None:
    first = chat(live, depth).choices[0].message.content
    turns = [
        *ASK,
        {"role": "assistant", "content": first or ""},
        {"role": "user", "content": "And 4?"},
    ]
    assert chat(live, depth, messages=turns).usage.prompt_tokens > 20


def test_completions_have_depths_per_prompt_and_choice(live: Live, depth: dict[str, Any]) -> None:
    answer = live.client.completions.create(
        model=live.model,
        prompt=["one two", "three"],
        n=2,
        max_tokens=6,
        seed=3,
        echo=True,
        extra_body=depth | {"return_depths": True, "ignore_eos": True},
    )
    assert [len(choice.depths) for choice in answer.choices] == [6] * 4
    assert answer.choices[0].text.startswith("one two")
    check([choice.depths for choice in answer.choices], answer.usage, depth)


def test_responses_honour_depth(live: Live, depth: dict[str, Any]) -> None:
    answer = live.client.responses.create(
        model=live.model, input="What is 2 + 3?", max_output_tokens=8, extra_body=depth
    )
    told = answer.usage.depth
    assert told["loops_run"] + told["loops_skipped"] == LOOPS * answer.usage.output_tokens
    assert (told["loops_skipped"] == 0) == (depth == FULL)
    *_, last = live.client.responses.create(
        model=live.model, input="hi", max_output_tokens=8, stream=True, extra_body=depth
    )
    assert sum(last.response.usage.depth["histogram"].values()) == last.response.usage.output_tokens


def test_reasoning_is_told_by_token_id(live: Live, depth: dict[str, Any]) -> None:
    opened = {"add_generation_prompt": False, "continue_final_message": True}
    begun = [*ASK, {"role": "assistant", "content": "<think>"}]
    message = (
        chat(live, depth, messages=begun, extra_body=opened, logit_bias=WORD).choices[0].message
    )
    assert message.reasoning
    assert not message.content
    tagged = {
        "structured_outputs": {"choice": ["<think>a</think>b"]},
        "return_token_ids": True,
    }
    by_id = chat(live, depth, logit_bias={"3": 100, "4": 100}, extra_body=tagged).choices[0]
    assert {3, 4} <= set(by_id.token_ids)
    assert (by_id.message.reasoning, by_id.message.content) == ("a", "b")
    spelled = chat(
        live, depth, logit_bias={"3": -100, "4": -100}, max_tokens=64, extra_body=tagged
    ).choices[0]
    assert not {3, 4} & set(spelled.token_ids)
    assert (spelled.message.reasoning, spelled.message.content) == (None, "<think>a</think>b")
