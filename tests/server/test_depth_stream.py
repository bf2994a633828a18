"""Depths on streams and complete responses, through vLLM's own generators."""

from __future__ import annotations

import asyncio
from itertools import chain
from typing import Any

import pytest
from vllm.entrypoints.generate.base.protocol import DeltaMessage

from ouro_server.depth import read_request
from ouro_server.schemas import DepthChatRequest, DepthCompletionRequest
from ouro_server.serving import DepthServingChat, DepthServingCompletion, without_alias
from tests.server.fakes import events, handler, metadata, output, replay, result, serve

USAGE = {"include_usage": True}


def chat(**fields: Any) -> DepthChatRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    return DepthChatRequest.model_validate(body | fields)


def chat_stream(results: list[Any], request: DepthChatRequest, **attributes: Any) -> list[dict]:
    serving = handler(DepthServingChat, **attributes)
    conversation = [{"role": "user", "content": "said"}]
    stream = serving.chat_completion_stream_generator(
        request, replay(results), "id", "m", conversation, object(), metadata()
    )
    return asyncio.run(events(stream))


def completion_stream(results: list[Any], prompts: int = 1, **fields: Any) -> list[dict]:
    request = DepthCompletionRequest.model_validate(
        {"model": "m", "prompt": ["p"] * prompts, "stream": True} | fields
    )
    inputs = [{"prompt": "p", "prompt_token_ids": [1]}] * prompts
    serving = handler(DepthServingCompletion)
    stream = serving.completion_stream_generator(
        request, inputs, replay(results), "id", 0, "m", prompts, None, metadata()
    )
    return asyncio.run(events(stream))


def depths_by_choice(chunks: list[dict], key: str = "depths") -> dict[int, list[list]]:
    """Per choice, what each chunk that has `key` says under it."""
    found: dict[int, list[list]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            if key in choice:
                found.setdefault(choice["index"], []).append(choice[key])
    return found


TWO_CHOICES = [
    result(output([4, 1], "a", 0)),
    result(output([4], "x", 1)),
    result(output([2], "b", 0, finish="stop")),
    result(output([3, 3], "y", 1, finish="length")),
]


def test_each_chat_chunk_has_the_depths_of_its_tokens() -> None:
    chunks = chat_stream(TWO_CHOICES, chat(n=2, return_depths=True))
    assert depths_by_choice(chunks) == {0: [[4, 1], [2]], 1: [[4], [3, 3]]}
    assert ["depths" in c["choices"][0] for c in chunks] == [False, False, True, True, True, True]


def test_depths_are_sent_only_when_asked_for() -> None:
    chunks = chat_stream(TWO_CHOICES, chat(n=2, stream_options=USAGE))
    assert depths_by_choice(chunks) == {}
    assert all("usage" not in chunk for chunk in chunks[:-1])


@pytest.mark.parametrize("depths_too", [False, True])
def test_exit_cdfs_are_sent_for_the_tokens_of_each_chunk(depths_too: bool) -> None:
    chunks = chat_stream(TWO_CHOICES, chat(n=2, return_exit_cdf=True, return_depths=depths_too))
    sent = depths_by_choice(chunks, "exit_cdf")
    lengths = {choice: [list(map(len, cdfs)) for cdfs in each] for choice, each in sent.items()}
    assert lengths == {0: [[4, 1], [2]], 1: [[4], [3, 3]]}
    assert sent[0][1] == [pytest.approx([0.1, 0.2])]
    assert depths_by_choice(chunks) == (lengths if depths_too else {})


def test_the_final_usage_chunk_sums_all_choices() -> None:
    last = chat_stream(TWO_CHOICES, chat(n=2, stream_options=USAGE))[-1]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 6
    assert last["usage"]["depth"] == {
        "mean": 17 / 6,
        "histogram": {"1": 1, "2": 1, "3": 2, "4": 2},
        "loops_run": 17,
        "loops_skipped": 7,
        "drafts_made": 0,
        "drafts_right": 0,
        "source": "default",
        "preset": None,
    }


def test_answers_carry_the_alias_and_the_source_they_were_asked_for_by() -> None:
    body = {"model": "m@fast", "messages": [{"role": "user", "content": "hi"}]}
    request = chat(**body, stream_options=USAGE)
    request.resolve(read_request(body, serve()))
    request = without_alias(request, serve())
    chunks = chat_stream([result(output([2], "a", finish="stop"))], request)
    assert {chunk["model"] for chunk in chunks} == {"m@fast"}
    told = chunks[-1]["usage"]["depth"]
    assert (told["source"], told["preset"]) == ("alias", "fast")


def test_continuous_usage_counts_what_the_chunk_counts() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    for chunk in chat_stream(TWO_CHOICES, chat(n=2, stream_options=options)):
        usage = chunk["usage"]
        assert sum(usage["depth"]["histogram"].values()) == usage["completion_tokens"]


class HoldingParser:
    """A parser that shows nothing until the last token."""

    reasoning_parser = None
    tool_parser = None

    def __init__(self, *_: Any, **__: Any) -> None:
        self.held = ""

    def parse_delta(self, *, delta_text: str, finished: bool, **_: Any) -> DeltaMessage | None:
        self.held += delta_text
        return DeltaMessage(content=self.held) if finished else None


def test_tokens_a_parser_holds_back_keep_their_depths() -> None:
    request = chat(return_depths=True)
    chunks = chat_stream(
        [result(output([d], "t")) for d in (4, 1, 2)] + [result(output([3], "!", finish="stop"))],
        request,
        parser_cls=HoldingParser,
        model_config=None,
    )
    assert depths_by_choice(chunks) == {0: [[4, 1, 2, 3]]}
    assert chunks[-1]["choices"][0]["delta"]["content"] == "ttt!"


def test_text_held_back_for_a_stop_string_does_not_hold_depths() -> None:
    chunks = chat_stream(
        [
            result(output([4], "")),
            result(output([1], "ab")),
            result(output([2], "", finish="stop", stop_reason="c")),
        ],
        chat(stop=["c"], return_depths=True),
    )
    assert depths_by_choice(chunks) == {0: [[4], [1], [2]]}


def test_chat_echo_repeats_no_depths() -> None:
    request = chat(echo=True, return_depths=True, add_generation_prompt=False)
    chunks = chat_stream([result(output([4], "a", finish="stop"))], request)
    assert depths_by_choice(chunks) == {0: [[4]]}
    assert len(chunks) == 3


def test_a_chat_chunk_without_tokens_has_no_depths_to_repeat() -> None:
    chunks = chat_stream(
        [result(output([4], "a")), result(output([], "", finish="stop"))],
        chat(return_depths=True, stream_options=USAGE),
    )
    assert depths_by_choice(chunks) == {0: [[4], []]}
    assert chunks[-1]["usage"]["depth"]["loops_run"] == 4


def test_completion_choices_of_several_prompts_keep_apart() -> None:
    results = [
        (0, result(output([4], "a", 0))),
        (1, result(output([1], "b", 1, finish="stop"))),
        (1, result(output([2, 2], "c", 0, finish="stop"))),
        (0, result(output([3], "d", 1, finish="stop"))),
        (0, result(output([1], "e", 0, finish="stop"))),
    ]
    chunks = completion_stream(
        results, prompts=2, n=2, return_depths=True, stream_options=USAGE, max_tokens=4
    )
    assert depths_by_choice(chunks) == {0: [[4], [1]], 3: [[1]], 2: [[2, 2]], 1: [[3]]}
    assert chunks[-1]["usage"]["depth"]["histogram"] == {"1": 2, "2": 2, "3": 1, "4": 1}


def test_completion_echo_has_depths_for_generated_tokens_only() -> None:
    results = [(0, result(output([4], "a"))), (0, result(output([2], "b", finish="stop")))]
    chunks = completion_stream(results, echo=True, return_depths=True, max_tokens=4)
    assert chunks[0]["choices"][0]["text"] == "prompta"
    assert depths_by_choice(chunks) == {0: [[4], [2]]}


def test_a_failure_mid_stream_passes_as_vllm_reports_it() -> None:
    results = [result(output([4], "a")), result(output([1], "", finish="error"))]
    chunks = chat_stream(results, chat(return_depths=True))
    assert chunks[-1]["error"]["code"] == 500


def test_misaligned_depths_end_the_stream_with_an_error() -> None:
    wrong = output([1, 2], "a")
    wrong.loops_run = [1]
    chunks = chat_stream([result(wrong)], chat(return_depths=True))
    assert "1 loop counts" in chunks[-1]["error"]["message"]


def test_closing_the_stream_closes_the_engines_generator() -> None:
    closed = []

    async def endless() -> Any:
        try:
            while True:
                yield result(output([1], "a"))
        finally:
            closed.append(True)

    async def leave_early() -> None:
        stream = handler(DepthServingChat).chat_completion_stream_generator(
            chat(return_depths=True), endless(), "id", "m", [], object(), metadata()
        )
        for _ in range(3):
            await anext(stream)
        await stream.aclose()
        await asyncio.sleep(0)

    asyncio.run(leave_early())
    assert closed == [True]


def test_what_each_loop_said_comes_with_the_tokens_it_is_of() -> None:
    said = [[[{"token": "a", "token_id": place, "logprob": -0.5}]] for place in range(3)]
    first, last = output([4, 1], "a"), output([2], "b", finish="stop")
    first.loops, last.loops = said[:2], said[2:]
    chunks = chat_stream([result(first), result(last)], chat(return_loops=1))
    assert list(chain(*depths_by_choice(chunks, "loops")[0])) == said
    unasked = chat_stream([result(output([4], "a", finish="stop"))], chat(return_depths=True))
    assert not depths_by_choice(unasked, "loops")


@pytest.mark.parametrize("wanted", [True, False])
def test_a_complete_chat_has_depths_and_usage(wanted: bool) -> None:
    final = result(output([4, 1], "a", 0, "stop"), output([2], "b", 1, "stop"))
    request = chat(n=2, return_depths=wanted, return_exit_cdf=wanted, stream=False)
    answer = handler(DepthServingChat).chat_completion_full_generator(
        request, replay([final]), "id", "m", [], object(), metadata()
    )
    body = asyncio.run(answer).model_dump()
    assert [c.get("depths") for c in body["choices"]] == ([[4, 1], [2]] if wanted else [None] * 2)
    cdfs = [c.get("exit_cdf") for c in body["choices"]]
    assert cdfs == ([o.exit_cdf for o in final.outputs] if wanted else [None] * 2)
    assert body["usage"]["depth"]["histogram"] == {"1": 1, "2": 1, "3": 0, "4": 1}


def test_a_complete_completion_has_depths_and_usage() -> None:
    batch = [
        result(output([4, 1], "a", 0, "stop"), output([2], "b", 1, "stop")),
        result(output([3], "c", 0, "stop"), output([4], "d", 1, "stop")),
    ]
    request = DepthCompletionRequest.model_validate(
        {"model": "m", "prompt": ["p", "q"], "n": 2, "max_tokens": 4, "return_depths": True}
    )
    response = handler(DepthServingCompletion).request_output_to_completion_response(
        batch, request, "id", 0, "m", None, metadata()
    )
    body = response.model_dump()
    assert [c["depths"] for c in body["choices"]] == [[4, 1], [2], [3], [4]]
    assert body["usage"]["depth"]["loops_run"] == 14


def test_a_beam_searchs_answer_is_left_alone() -> None:
    final = result(output([4, 1], "a", 0, "stop"))
    for made in final.outputs:
        del made.depths, made.loops_run, made.drafts, made.drafts_dropped
    answer = handler(DepthServingChat).chat_completion_full_generator(
        chat(stream=False), replay([final]), "id", "m", [], object(), metadata()
    )
    assert "depth" not in asyncio.run(answer).model_dump()["usage"]
