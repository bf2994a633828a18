"""No request can end another: what the engine could not take is refused before it is sent there.

vLLM turns a request into engine input when its answer is first asked for: too late to refuse a
stream, and what then raises is taken for a fault of the server's. So it is rehearsed as soon as the
request is handed over: input processing, and the way to the engine process and back.
"""

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from ouro_server.honest_status import progress_of_request
from ouro_server.vllm_api import (
    EngineCoreRequest,
    MsgpackDecoder,
    MsgpackEncoder,
    VLLMError,
    VLLMNotFoundError,
    VLLMValidationError,
)

_CALLED = {"extra_args": "vllm_xargs", "reasoning_parser_kwargs": "chat_template_kwargs"}
"""Fields of engine requests that clients know by another name."""

GRAMMARS = ("structured_outputs", "response_format", "text", "output_config", "tools")
"""Fields of request bodies that become a grammar, the most likely to be meant first."""

logger = logging.getLogger(__name__)


class Door:
    """Refuses requests that the engine could not take.

    Args:
        engine_client: vLLM's client of the engine.
        tasks: what the engine supports (`engine_client.get_supported_tasks()`).
    """

    def __init__(self, engine_client: Any, tasks: Any) -> None:
        self._client = engine_client
        self._tasks = tasks
        self._encoder = MsgpackEncoder()
        self._decoder = MsgpackDecoder(EngineCoreRequest)

    def check(
        self,
        prompt: Any,
        sampling_params: Any,
        request_id: str,
        *,
        prompt_text: str | None = None,
        reasoning_ended: bool | None = None,
        reasoning_parser_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Rehearse what `generate` of these arguments will do before the engine has the request.

        Raises:
            VLLMError: vLLM's own refusals, and `VLLMValidationError` for everything else that is
                raised, naming the field where it is known.
        """
        try:
            request = self._client.input_processor.process_inputs(
                request_id, prompt, sampling_params, supported_tasks=self._tasks, **options
            )
        except (VLLMError, ValueError, NotImplementedError):  # have a status, which is not 500
            raise
        except Exception as error:
            logger.warning("refused a request that cannot be processed", exc_info=True)
            raise _refusal(error, _grammar_field(sampling_params)) from error
        request.reasoning_parser_kwargs = reasoning_parser_kwargs
        try:
            self._send(request)
        except Exception as error:
            raise _refusal(error, self._culprit(request)) from error

    def _send(self, value: Any) -> None:
        self._decoder.decode(self._encoder.encode(value))

    def _culprit(self, request: Any) -> str | None:
        """The field that cannot be sent, as clients call it."""
        params = request.sampling_params
        parts = {
            **(params.extra_args or {}),
            **{name: getattr(params, name) for name in params.__struct_fields__},
            **{name: getattr(request, name) for name in request.__struct_fields__},
        }
        for name, value in parts.items():
            try:
                self._encoder.encode(value)
            except Exception:
                if name != "sampling_params":
                    return _CALLED.get(name, name)
        return None


def open_door(engine_client: Any, tasks: Any) -> Door:
    """Let an engine client take only what passes the door, checked before `generate` returns."""
    generate, door = engine_client.generate, Door(engine_client, tasks)

    def checked(
        prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        if engine_client.errored:
            raise engine_client.dead_error
        door.check(prompt, sampling_params, *args, **kwargs)
        progress_of_request().admitted = True
        results = generate(prompt, sampling_params, *args, **kwargs)
        if kwargs.get("lora_request") is not None:
            results = adapted(results)
        if sampling_params.structured_outputs is None:
            return results
        return _constrained(results, _grammar_field(sampling_params))

    engine_client.generate = checked
    return door


async def adapted(results: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    """`results` of a request for an adapter, which may turn out not to be there any more: a 404,
    as when it is loaded. The engine says why where it would say what a request stopped at."""
    async with aclosing(results):
        async for result in results:
            for output in result.outputs:
                if output.finish_reason == "error" and output.stop_reason is not None:
                    raise VLLMNotFoundError(str(output.stop_reason))
            yield result


async def _constrained(
    results: AsyncGenerator[Any, None], field: str | None
) -> AsyncGenerator[Any, None]:
    """`results` of a request with a grammar, whose errors in the engine are the grammar's.

    It is compiled there. One that has no text at all (a schema that refers only to itself), or gets
    to where nothing may follow, rejects whatever is sampled. The engine has logged which.
    """
    async with aclosing(results):
        async for result in results:
            if any(output.finish_reason == "error" for output in result.outputs):
                raise VLLMValidationError(
                    f"{field or 'the grammar'} cannot be followed: it does not compile, or allows "
                    "no text",
                    parameter=field,
                )
            yield result


def _grammar_field(sampling_params: Any) -> str | None:
    """The field of the body that became a grammar, if there is one."""
    if sampling_params.structured_outputs is None:
        return None
    fields = progress_of_request().fields
    return next((name for name in GRAMMARS if name in fields), None)


def _refusal(error: Exception, field: str | None) -> VLLMValidationError:
    return VLLMValidationError(
        f"{field or 'the request'} cannot be handed to the engine: "
        f"{type(error).__name__}: {str(error)[:200]}",
        parameter=field,
    )
