"""vLLM's serving handlers with depth on what they return.

Each subclass adds no state of its own, so `adopt` can turn a handler that vLLM built into one: how
vLLM constructs them is not repeated here.
"""

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any, TypeVar

from ouro_runtime.config import LoopConfig
from ouro_runtime.engine.reasoning import reading_ids
from ouro_server.stream import DepthLedger, annotating, noting
from ouro_server.usage import DepthTally, tokens_of
from ouro_server.vllm_api import (
    ChatCompletionResponse,
    CompletionResponse,
    OpenAIServingChat,
    OpenAIServingCompletion,
    OpenAIServingResponses,
)

H = TypeVar("H")


def adopt(handler: Any, cls: type[H], config: LoopConfig) -> H:
    """The twin of a handler vLLM built, as `cls`, sharing its state."""
    assert issubclass(cls, type(handler)), f"{cls.__name__} does not extend {type(handler)}"
    twin = cls.__new__(cls)
    twin.__dict__.update(handler.__dict__, depth_config=config)
    return twin


def read_token_ids(handler: Any) -> None:
    """Let the parser of a handler tell reasoning by token id, if it is ours."""
    for name in ("parser_cls", "parser"):
        if (parser := handler.__dict__.get(name)) is not None:
            setattr(handler, name, reading_ids(parser))


def describe(response: Any, outputs: Iterable[Any], return_depths: bool, loops: int) -> None:
    """Put `depths` (if asked for) and `usage.depth` on a complete response, in place.

    `outputs` are the choices' `CompletionOutput`s, in order. Those of a beam search carry no
    depths: it asks the engine for one token at a time, and its answers stay as they are.
    """
    outputs = list(outputs)
    if not all(hasattr(output, "depths") for output in outputs):
        return
    tally = DepthTally(loops)
    for choice, output in zip(response.choices, outputs, strict=True):
        depths, loops_run = tokens_of(output)
        tally.add(depths, loops_run)
        if return_depths:
            choice.depths = depths
    response.usage.depth = tally.usage()


def wants_depths(request: Any) -> bool:
    """Whether a request asked for the depth of every token."""
    return bool(getattr(request, "return_depths", False))


class DepthServingChat(OpenAIServingChat):
    """Chat completions with depth."""

    depth_config: LoopConfig

    async def chat_completion_stream_generator(
        self, request: Any, result_generator: AsyncGenerator[Any, None], *args: Any, **kwargs: Any
    ) -> AsyncGenerator[str, None]:
        ledger = DepthLedger(self.depth_config.loops)
        results = noting(result_generator, ledger, lambda r: ((o.index, o) for o in r.outputs))
        events = super().chat_completion_stream_generator(request, results, *args, **kwargs)
        async with aclosing(annotating(events, ledger, wants_depths(request))) as annotated:
            async for event in annotated:
                yield event

    async def chat_completion_full_generator(
        self, request: Any, result_generator: AsyncGenerator[Any, None], *args: Any, **kwargs: Any
    ) -> Any:
        last: list[Any] = []

        async def keeping_last() -> AsyncGenerator[Any, None]:
            async with aclosing(result_generator):
                async for result in result_generator:
                    last[:] = [result]
                    yield result

        response = await super().chat_completion_full_generator(
            request, keeping_last(), *args, **kwargs
        )
        if isinstance(response, ChatCompletionResponse):
            describe(response, last[0].outputs, wants_depths(request), self.depth_config.loops)
        return response


class DepthServingCompletion(OpenAIServingCompletion):
    """Completions with depth."""

    depth_config: LoopConfig

    async def completion_stream_generator(
        self,
        request: Any,
        engine_inputs: Any,
        result_generator: AsyncGenerator[Any, None],
        *args: Any,
        **kwargs: Any,
    ) -> AsyncGenerator[str, None]:
        ledger = DepthLedger(self.depth_config.loops)
        n = request.n or 1

        def outputs(item: tuple[int, Any]) -> Iterable[tuple[int, Any]]:
            prompt, result = item
            return ((o.index + prompt * n, o) for o in result.outputs)

        events = super().completion_stream_generator(
            request, engine_inputs, noting(result_generator, ledger, outputs), *args, **kwargs
        )
        async with aclosing(annotating(events, ledger, wants_depths(request))) as annotated:
            async for event in annotated:
                yield event

    def request_output_to_completion_response(
        self, final_res_batch: list[Any], request: Any, *args: Any, **kwargs: Any
    ) -> CompletionResponse:
        response = super().request_output_to_completion_response(
            final_res_batch, request, *args, **kwargs
        )
        outputs = [output for result in final_res_batch for output in result.outputs]
        describe(response, outputs, wants_depths(request), self.depth_config.loops)
        return response


class DepthServingResponses(OpenAIServingResponses):
    """The Responses API with `usage.depth`."""

    depth_config: LoopConfig

    async def _generate_with_builtin_tools(
        self, *args: Any, context: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        context.depth_tally = DepthTally(self.depth_config.loops)
        turns = super()._generate_with_builtin_tools(*args, context=context, **kwargs)
        async with aclosing(turns):
            async for item in turns:
                result = getattr(item, "last_output", None)
                for output in result.outputs if result else ():
                    item.depth_tally.add(*tokens_of(output))
                yield item

    async def responses_full_generator(
        self,
        request: Any,
        sampling_params: Any,
        result_generator: Any,
        context: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        response = await super().responses_full_generator(
            request, sampling_params, result_generator, context, *args, **kwargs
        )
        usage = getattr(response, "usage", None)
        # vLLM's experimental contexts do not show what the engine delivered: no depth then.
        if usage is not None and context.depth_tally.tokens == usage.output_tokens:
            usage.depth = context.depth_tally.usage()
        return response
