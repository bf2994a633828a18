"""vLLM's Responses handler with depth on what it returns (see `serving.py`)."""

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Literal

from pydantic import BaseModel

from ouro_server.door import Door
from ouro_server.errors import STOPPED
from ouro_server.served import ServedDepth
from ouro_server.serving import name_for, resolved_of, without_alias
from ouro_server.usage import DepthTally, tokens_of
from ouro_server.vllm_api import (
    EngineDeadError,
    OpenAIServingResponses,
    ResponsesResponse,
    VLLMValidationError,
)

logger = logging.getLogger(__name__)


class StreamError(BaseModel):
    """OpenAI's event for a stream that cannot go on."""

    type: Literal["error"] = "error"
    code: str
    message: str
    param: None = None
    sequence_number: int


class DepthServingResponses(OpenAIServingResponses):
    """The Responses API with `usage.depth`."""

    depth: ServedDepth
    door: Door

    async def create_responses(self, request: Any, raw_request: Any = None) -> Any:
        request = without_alias(request, self.depth)
        answer = await super().create_responses(request, raw_request)
        if isinstance(answer, ResponsesResponse):
            # vLLM builds the answer to a background request ("queued") without our generators.
            answer.model = name_for(request, answer.model)
        return answer

    def _generate_with_builtin_tools(
        self,
        request_id: str,
        engine_input: Any,
        sampling_params: Any,
        context: Any,
        tok_params: Any = None,
        **kwargs: Any,
    ) -> AsyncGenerator[Any, None]:
        # A stream begins before vLLM asks the engine.
        self.door.check(engine_input, sampling_params, request_id, **kwargs)
        return self._turns(
            request_id,
            engine_input,
            sampling_params,
            context=context,
            tok_params=tok_params,
            **kwargs,
        )

    async def _turns(self, *args: Any, context: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        context.depth_tally = DepthTally(self.depth.loops)
        turns = super()._generate_with_builtin_tools(*args, context=context, **kwargs)
        async with aclosing(turns):
            async for item in turns:
                result = getattr(item, "last_output", None)
                for output in result.outputs if result else ():
                    item.depth_tally.add(tokens_of(output))
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
        name = name_for(request, model_name)
        events = super().responses_stream_generator(
            request, sampling_params, result_generator, context, name, *args, **kwargs
        )
        number = 0
        async with aclosing(events):
            try:
                async for event in events:
                    number += 1
                    yield event
            except EngineDeadError:
                yield StreamError(
                    code="service_unavailable", message=STOPPED, sequence_number=number
                )
            except VLLMValidationError as error:
                yield StreamError(code="invalid_prompt", message=str(error), sequence_number=number)
            except Exception as error:
                # vLLM lets it break the connection; the client would not know why.
                logger.exception("a stream of the Responses API failed")
                yield StreamError(code="server_error", message=str(error), sequence_number=number)

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
        name = name_for(request, model_name)
        response = await super().responses_full_generator(
            request, sampling_params, result_generator, context, name, *args, **kwargs
        )
        usage = getattr(response, "usage", None)
        # vLLM's experimental contexts do not show what the engine delivered: no depth then.
        if usage is not None and context.depth_tally.tokens == usage.output_tokens:
            usage.depth = context.depth_tally.usage(resolved_of(request))
            self.depth.count(resolved_of(request), context.depth_tally)
        return response
