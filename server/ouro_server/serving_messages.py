"""vLLM's Messages handler with depth, whose streams say what ended them (see `serving.py`)."""

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from ouro_server.depth import SESSION
from ouro_server.schemas import DepthChatRequest, DepthMessagesResponse
from ouro_server.serving import DepthServingChat, error_of, resolved_of
from ouro_server.vllm_api import (
    AnthropicError,
    AnthropicServingMessages,
    AnthropicStreamEvent,
    ErrorResponse,
)

_LAST_USAGE = "event: message_delta\ndata: "


class DepthServingMessages(DepthServingChat, AnthropicServingMessages):
    """The Messages API. vLLM answers it with a chat completion, event by event."""

    @classmethod
    def to_chat_completion_request(cls, anthropic_request: Any, **options: Any) -> Any:
        chat = super().to_chat_completion_request(anthropic_request, **options)
        if (resolved := resolved_of(anthropic_request)) is None:
            return chat
        deep = DepthChatRequest.model_construct(chat.model_fields_set, **chat.__dict__)
        deep.vllm_xargs = dict(chat.vllm_xargs or {})
        deep.session_id = deep.vllm_xargs.pop(SESSION, None)
        deep.resolve(resolved)
        return deep

    def messages_full_converter(self, generator: Any) -> Any:
        message = super().messages_full_converter(generator)
        shown = message.model_dump(exclude_unset=True)
        shown["usage"]["depth"] = generator.usage.depth
        return DepthMessagesResponse.model_validate(shown)

    async def message_stream_converter(
        self, generator: AsyncGenerator[str, None]
    ) -> AsyncGenerator[str, None]:
        # vLLM reads every event as a piece of an answer.
        errors: list[ErrorResponse] = []
        depth: dict[str, Any] = {}

        async def pieces() -> AsyncGenerator[str, None]:
            async with aclosing(generator):
                async for event in generator:
                    if (error := error_of(event)) is not None:
                        errors.append(error)
                        return
                    if '"choices":[],' in event:
                        depth.update(json.loads(event.removeprefix("data: "))["usage"])
                    yield event

        async with aclosing(super().message_stream_converter(pieces())) as events:
            async for event in events:
                yield with_depth(event, depth.get("depth"))
        for error in errors:
            said = AnthropicError(type=error.error.type, message=error.error.message)
            event = AnthropicStreamEvent(type="error", error=said)
            yield f"event: error\ndata: {event.model_dump_json(exclude_unset=True)}\n\n"


def with_depth(event: str, depth: dict[str, Any] | None) -> str:
    """An event of the Messages API; the one that tells all usage tells that of depth too."""
    if depth is None or not event.startswith(_LAST_USAGE):
        return event
    told = json.loads(event.removeprefix(_LAST_USAGE))
    told["usage"]["depth"] = depth
    return f"{_LAST_USAGE}{json.dumps(told, ensure_ascii=False, separators=(',', ':'))}\n\n"
