"""vLLM's serving handlers with depth on what they return.

Each subclass adds no state of its own, so `adopt` can turn a handler that vLLM built into one: how
vLLM constructs them is not repeated here.
"""

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from http import HTTPStatus
from typing import Any, TypeVar

from ouro_runtime.engine.reasoning import reading_ids
from ouro_server.depth import RETURN_FIELDS, read_request
from ouro_server.errors import STOPPED
from ouro_server.resolve import Resolved
from ouro_server.schemas import DepthChatRequest, DepthCompletionRequest, DepthFields
from ouro_server.served import ServedDepth
from ouro_server.stream import DepthLedger, annotating, noting
from ouro_server.usage import DepthTally, tokens_of
from ouro_server.vllm_api import (
    ChatCompletionResponse,
    CompletionResponse,
    EngineDeadError,
    ErrorResponse,
    OpenAIServingChat,
    OpenAIServingChatBatch,
    OpenAIServingCompletion,
)

H = TypeVar("H")
T = TypeVar("T")


def adopt(handler: Any, cls: type[H], served: ServedDepth) -> H:
    """The twin of a handler vLLM built, as `cls`, sharing its state."""
    assert issubclass(cls, type(handler)), f"{cls.__name__} does not extend {type(handler)}"
    twin = cls.__new__(cls)
    twin.__dict__.update(handler.__dict__, depth=served)
    return twin


def read_token_ids(handler: Any) -> None:
    """Let the parser of a handler tell reasoning by token id, if it is ours."""
    for name in ("parser_cls", "parser"):
        if (parser := handler.__dict__.get(name)) is not None:
            setattr(handler, name, reading_ids(parser))


def describe(response: Any, outputs: Iterable[Any], request: Any, served: ServedDepth) -> None:
    """Put what was asked for of every token, and `usage.depth`, on a complete response, in place,
    and count it.

    `outputs` are the choices' `CompletionOutput`s, in order. Those of a beam search carry no
    depths: it asks the engine for one token at a time, and its answers stay as they are.
    """
    outputs = list(outputs)
    if not all(hasattr(output, "depths") for output in outputs):
        return
    tally, keys = DepthTally(served.loops), wanted_keys(request)
    for choice, output in zip(response.choices, outputs, strict=True):
        tally.add(tokens_of(output))
        for key in keys:
            setattr(choice, key, list(getattr(output, key)))
    response.usage.depth = tally.usage(resolved_of(request))
    served.count(resolved_of(request), tally)


def resolved_of(request: Any) -> Resolved | None:
    """The depth a request was resolved to; None where it came through an endpoint without depth."""
    return getattr(request, "resolved", None)


def name_for(request: Any, model_name: str) -> str:
    """The model's name in an answer: the alias it was asked for by, else vLLM's."""
    return getattr(request, "alias", None) or model_name


def without_alias(request: Any, served: ServedDepth) -> Any:
    """The request, which asks vLLM for a model that it knows."""
    if isinstance(request, DepthFields) and (alias := served.alias(request.model)) is not None:
        request.ask_for(alias[0])
    return request


def wanted_keys(request: Any) -> tuple[str, ...]:
    """What a request asked to be told of every token: keys of a choice."""
    return tuple(key for flag, key in RETURN_FIELDS.items() if getattr(request, flag, None))


async def deepened(
    request: Any, raw_request: Any, cls: type[DepthFields], served: ServedDepth
) -> Any:
    """A request with its depth. One that came to `/invocations` is none of ours yet: vLLM reads the
    body itself, with the model that a header names in the place of the body's, or with none."""
    if isinstance(request, DepthFields) or raw_request is None:
        return request
    body = await raw_request.json()
    if body.get("model") is None:
        body = {**body, "model": raw_request.state.model}
    deep = cls.model_validate(body)
    deep.resolve(read_request(body, served))
    return deep


async def keeping_last(results: AsyncGenerator[T, None], last: list[T]) -> AsyncGenerator[T, None]:
    """`results`; the newest is all that is in `last`."""
    async with aclosing(results):
        async for result in results:
            last[:] = [result]
            yield result


class NamedErrors:
    """Errors in a stream that name what they are."""

    def create_streaming_error_response(self, message: Any, *args: Any, **kwargs: Any) -> str:
        if isinstance(message, EngineDeadError):  # 503, as whole answers say
            status = HTTPStatus.SERVICE_UNAVAILABLE
            message, args, kwargs = STOPPED, ("ServiceUnavailableError", status), {}
        return super().create_streaming_error_response(message, *args, **kwargs)  # type: ignore[misc]


async def begun(answer: Any, raw_request: Any) -> Any:
    """An answer of vLLM's; a stream has its first event ready, or is the error that it began with.

    With keep-alives a stream begins at once: they are there to say something while it waits.
    """
    args = getattr(raw_request.app.state, "args", None) if raw_request else None
    if not isinstance(answer, AsyncGenerator) or getattr(args, "sse_keep_alive_interval", 0) > 0:
        return answer
    first = await anext(answer, None)
    if first is not None and (error := error_of(first)) is not None:
        await answer.aclose()
        return error
    return _resumed(first, answer)


def error_of(event: str) -> ErrorResponse | None:
    """The error that an event of a chat or completion stream is, if it is one."""
    if not event.startswith('data: {"error"'):
        return None
    return ErrorResponse.model_validate_json(event.removeprefix("data: "))


async def _resumed(
    first: str | None, events: AsyncGenerator[str, None]
) -> AsyncGenerator[str, None]:
    async with aclosing(events):
        if first is not None:
            yield first
        async for event in events:
            yield event


class BegunChat(NamedErrors, OpenAIServingChat):
    """Chat completions whose streams begin with what there is to send."""

    async def create_chat_completion(self, request: Any, raw_request: Any = None) -> Any:
        return await begun(await super().create_chat_completion(request, raw_request), raw_request)


class DepthServingChat(BegunChat):
    """Chat completions with depth."""

    depth: ServedDepth

    async def create_chat_completion(self, request: Any, raw_request: Any = None) -> Any:
        request = await deepened(request, raw_request, DepthChatRequest, self.depth)
        request = without_alias(request, self.depth)
        return await super().create_chat_completion(request, raw_request)

    async def chat_completion_stream_generator(
        self,
        request: Any,
        result_generator: AsyncGenerator[Any, None],
        request_id: str,
        model_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> AsyncGenerator[str, None]:
        ledger = DepthLedger(self.depth.loops, resolved_of(request))
        name = name_for(request, model_name)
        results = noting(result_generator, ledger, lambda r: ((o.index, o) for o in r.outputs))
        events = super().chat_completion_stream_generator(
            request, results, request_id, name, *args, **kwargs
        )
        async with aclosing(annotating(events, ledger, wanted_keys(request))) as annotated:
            async for event in annotated:
                yield event
        self.depth.count(ledger.resolved, ledger.total())

    async def chat_completion_full_generator(
        self,
        request: Any,
        result_generator: AsyncGenerator[Any, None],
        request_id: str,
        model_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        last: list[Any] = []
        name = name_for(request, model_name)
        response = await super().chat_completion_full_generator(
            request, keeping_last(result_generator, last), request_id, name, *args, **kwargs
        )
        if isinstance(response, ChatCompletionResponse):
            describe(response, last[0].outputs, request, self.depth)
        return response


class DepthServingBatch(DepthServingChat, OpenAIServingChatBatch):
    """Several chats in one request, with depth."""

    async def create_batch_chat_completion(self, request: Any, raw_request: Any = None) -> Any:
        request = without_alias(request, self.depth)
        return await super().create_batch_chat_completion(request, raw_request)

    async def chat_completion_full_generator_batch(
        self,
        request: Any,
        generators: list[AsyncGenerator[Any, None]],
        request_id: str,
        model_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        last: list[list[Any]] = [[] for _ in generators]
        kept = [keeping_last(*pair) for pair in zip(generators, last, strict=True)]
        name = name_for(request, model_name)
        response = await super().chat_completion_full_generator_batch(
            request, kept, request_id, name, *args, **kwargs
        )
        if isinstance(response, ChatCompletionResponse):
            outputs = [output for (result,) in last for output in result.outputs]
            describe(response, outputs, request, self.depth)
        return response


class DepthServingCompletion(NamedErrors, OpenAIServingCompletion):
    """Completions with depth."""

    depth: ServedDepth

    async def create_completion(self, request: Any, raw_request: Any = None) -> Any:
        request = await deepened(request, raw_request, DepthCompletionRequest, self.depth)
        request = without_alias(request, self.depth)
        return await begun(await super().create_completion(request, raw_request), raw_request)

    async def completion_stream_generator(
        self,
        request: Any,
        engine_inputs: Any,
        result_generator: AsyncGenerator[Any, None],
        request_id: str,
        created_time: int,
        model_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> AsyncGenerator[str, None]:
        ledger = DepthLedger(self.depth.loops, resolved_of(request))
        n = request.n or 1

        def outputs(item: tuple[int, Any]) -> Iterable[tuple[int, Any]]:
            prompt, result = item
            return ((o.index + prompt * n, o) for o in result.outputs)

        events = super().completion_stream_generator(
            request,
            engine_inputs,
            noting(result_generator, ledger, outputs),
            request_id,
            created_time,
            name_for(request, model_name),
            *args,
            **kwargs,
        )
        async with aclosing(annotating(events, ledger, wanted_keys(request))) as annotated:
            async for event in annotated:
                yield event
        self.depth.count(ledger.resolved, ledger.total())

    def request_output_to_completion_response(
        self,
        final_res_batch: list[Any],
        request: Any,
        request_id: str,
        created_time: int,
        model_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> CompletionResponse:
        name = name_for(request, model_name)
        response = super().request_output_to_completion_response(
            final_res_batch, request, request_id, created_time, name, *args, **kwargs
        )
        outputs = [output for result in final_res_batch for output in result.outputs]
        describe(response, outputs, request, self.depth)
        return response
