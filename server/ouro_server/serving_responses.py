"""vLLM's Responses handler with depth on what it returns (see `serving.py`)."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from ouro_server.served import ServedDepth
from ouro_server.serving import name_for, resolved_of
from ouro_server.usage import DepthTally, tokens_of
from ouro_server.vllm_api import OpenAIServingResponses, ResponsesResponse


class DepthServingResponses(OpenAIServingResponses):
    """The Responses API with `usage.depth`."""

    depth: ServedDepth

    async def create_responses(self, request: Any, raw_request: Any = None) -> Any:
        answer = await super().create_responses(request, raw_request)
        if isinstance(answer, ResponsesResponse):
            # vLLM builds the answer to a background request ("queued") without our generators.
            answer.model = name_for(request, answer.model, self.depth)
        return answer

    async def _generate_with_builtin_tools(
        self, *args: Any, context: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        context.depth_tally = DepthTally(self.depth.loops)
        turns = super()._generate_with_builtin_tools(*args, context=context, **kwargs)
        async with aclosing(turns):
            async for item in turns:
                result = getattr(item, "last_output", None)
                for output in result.outputs if result else ():
                    item.depth_tally.add(*tokens_of(output))
                yield item

    async def responses_stream_generator(
        self,
        request: Any,
        sampling_params: Any,
        result_generator: Any,
        context: Any,
        model_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> AsyncGenerator[Any, None]:
        name = name_for(request, model_name, self.depth)
        events = super().responses_stream_generator(
            request, sampling_params, result_generator, context, name, *args, **kwargs
        )
        async with aclosing(events):
            async for event in events:
                yield event

    async def responses_full_generator(
        self,
        request: Any,
        sampling_params: Any,
        result_generator: Any,
        context: Any,
        model_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        name = name_for(request, model_name, self.depth)
        response = await super().responses_full_generator(
            request, sampling_params, result_generator, context, name, *args, **kwargs
        )
        usage = getattr(response, "usage", None)
        # vLLM's experimental contexts do not show what the engine delivered: no depth then.
        if usage is not None and context.depth_tally.tokens == usage.output_tokens:
            usage.depth = context.depth_tally.usage(resolved_of(request))
            self.depth.count(resolved_of(request), context.depth_tally)
        return response
