"""vLLM's Messages handler, whose streams say what ended them (see `serving.py`)."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from ouro_server.serving import BegunChat, error_of
from ouro_server.vllm_api import (
    AnthropicError,
    AnthropicServingMessages,
    AnthropicStreamEvent,
    ErrorResponse,
)


class DepthServingMessages(BegunChat, AnthropicServingMessages):
    """The Messages API. vLLM answers it with a chat completion, event by event."""

    async def message_stream_converter(
        self, generator: AsyncGenerator[str, None]
    ) -> AsyncGenerator[str, None]:
        # vLLM reads every event as a piece of an answer.
        errors: list[ErrorResponse] = []

        async def pieces() -> AsyncGenerator[str, None]:
            async with aclosing(generator):
                async for event in generator:
                    if (error := error_of(event)) is not None:
                        errors.append(error)
                        return
                    yield event

        async with aclosing(super().message_stream_converter(pieces())) as events:
            async for event in events:
                yield event
        for error in errors:
            said = AnthropicError(type=error.error.type, message=error.error.message)
            event = AnthropicStreamEvent(type="error", error=said)
            yield f"event: error\ndata: {event.model_dump_json(exclude_unset=True)}\n\n"
