"""A stream begins when there is something to send; what fails before that is an HTTP status."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest

from ouro_server.errors import STOPPED
from ouro_server.schemas import DepthChatRequest
from ouro_server.serving import DepthServingChat, DepthServingCompletion, begun
from ouro_server.serving_messages import DepthServingMessages
from ouro_server.serving_responses import DepthServingResponses
from ouro_server.vllm_api import (
    EngineDeadError,
    ErrorResponse,
    OpenAIServingChat,
    OpenAIServingResponses,
    VLLMValidationError,
    create_error_response,
)
from tests.server.fakes import handler

EVENTS = ["data: {}\n\n", "data: [DONE]\n\n"]


class Stream:
    """An event stream that notes whether it was begun and closed."""

    def __init__(self, *events: Any) -> None:
        self.events = events
        self.asked = self.closed = False

    async def __call__(self) -> AsyncGenerator[Any, None]:
        self.asked = True
        try:
            for event in self.events:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self.closed = True


def raw(interval: int = 0) -> Any:
    args = SimpleNamespace(sse_keep_alive_interval=interval)
    return SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace(args=args)))


@pytest.mark.parametrize("events", [EVENTS, EVENTS[:1], []])
def test_a_stream_is_sent_unchanged_and_closed(events: list[str]) -> None:
    stream = Stream(*events)

    async def run() -> list[str]:
        answer = await begun(stream(), raw())
        assert stream.asked
        return [event async for event in answer]

    assert asyncio.run(run()) == events
    assert stream.closed


def test_a_stream_that_begins_with_an_error_is_that_error() -> None:
    error = create_error_response("no", param="x")
    stream = Stream(f"data: {error.model_dump_json()}\n\n", EVENTS[1])
    assert asyncio.run(begun(stream(), raw())) == error
    assert stream.closed


def test_leaving_a_stream_closes_it() -> None:
    stream = Stream(*EVENTS)

    async def run() -> None:
        answer = await begun(stream(), raw())
        await anext(answer)
        await answer.aclose()

    asyncio.run(run())
    assert stream.closed


def test_with_keep_alives_a_stream_is_not_waited_for() -> None:
    stream = Stream(*EVENTS)
    asyncio.run(begun(stream(), raw(5)))
    assert not stream.asked


def test_whole_answers_and_errors_pass() -> None:
    for answer in (create_error_response("x"), SimpleNamespace()):
        assert asyncio.run(begun(answer, raw())) is answer


@pytest.mark.parametrize("cls", [DepthServingChat, DepthServingCompletion])
def test_a_dead_engine_is_named_in_a_stream(cls: type) -> None:
    told = handler(cls).create_streaming_error_response(EngineDeadError())
    error = ErrorResponse.model_validate_json(told).error
    assert (error.code, error.type, error.message) == (503, "ServiceUnavailableError", STOPPED)
    told = handler(cls).create_streaming_error_response(VLLMValidationError("no", parameter="x"))
    assert ErrorResponse.model_validate_json(told).error.param == "x"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EngineDeadError(), "service_unavailable"),
        (VLLMValidationError("no", parameter="x"), "invalid_prompt"),
        (RuntimeError("no"), "server_error"),
    ],
)
def test_a_stream_of_responses_that_fails_ends_with_an_error_event(
    error: Exception, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream(SimpleNamespace(type="response.created"), error)
    monkeypatch.setattr(
        OpenAIServingResponses, "responses_stream_generator", lambda *_, **__: stream()
    )
    events = handler(DepthServingResponses).responses_stream_generator(
        SimpleNamespace(model="m"), None, None, None, "m"
    )

    async def run() -> list[Any]:
        return [event async for event in events]

    last = asyncio.run(run())[-1]
    assert (last.type, last.code, last.sequence_number) == ("error", code, 1)


def test_a_stream_of_messages_that_fails_ends_with_an_error_event() -> None:
    """Not with what vLLM's converter makes of an error that it takes for a piece of the answer."""
    messages = handler(DepthServingMessages)
    chunk = (
        'data: {"id": "a", "object": "chat.completion.chunk", "created": 1, "model": "m", '
        '"choices": [{"index": 0, "delta": {"role": "assistant", "content": "x"}}], '
        '"usage": {"prompt_tokens": 1, "total_tokens": 1, "completion_tokens": 0}}\n\n'
    )
    stream = Stream(chunk, f"data: {messages.create_streaming_error_response(EngineDeadError())}")

    async def run() -> list[str]:
        return [event async for event in messages.message_stream_converter(stream())]

    events = asyncio.run(run())
    assert len(events) > 1 and events[0].startswith("event: message_start")
    kind, said = events[-1].removesuffix("\n\n").split("\ndata: ")
    assert kind == "event: error"
    wanted = {"type": "ServiceUnavailableError", "message": STOPPED}
    assert json.loads(said) == {"type": "error", "error": wanted}
    assert stream.closed


def test_a_stream_of_messages_that_begins_with_an_error_is_that_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = create_error_response("no")
    stream = Stream(f"data: {error.model_dump_json()}\n\n")

    async def create(self: Any, request: Any, raw_request: Any = None) -> Any:
        return stream()

    monkeypatch.setattr(OpenAIServingChat, "create_chat_completion", create)
    request = DepthChatRequest.model_construct(model="m")
    answer = handler(DepthServingMessages).create_chat_completion(request, raw())
    assert asyncio.run(answer) == error
