"""All that the server takes from vLLM: the one file of this package that imports it."""

from argparse import Namespace
from typing import Any

from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.anthropic.api_router import create_messages as messages_route
from vllm.entrypoints.anthropic.protocol import (
    AnthropicError,
    AnthropicMessagesRequest,
    AnthropicMessagesResponse,
    AnthropicStreamEvent,
    AnthropicUsage,
)
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.launchers.api_server import entry as api_server
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.openai.chat_completion.api_router import (
    create_batch_chat_completion as batch_route,
)
from vllm.entrypoints.openai.chat_completion.api_router import (
    create_chat_completion as chat_route,
)
from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
from vllm.entrypoints.openai.chat_completion.protocol import (
    BatchChatCompletionRequest,
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatCompletionResponseChoice,
)
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.api_router import create_completion as completion_route
from vllm.entrypoints.openai.completion.protocol import (
    CompletionRequest,
    CompletionResponse,
    CompletionResponseChoice,
)
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.openai.responses.api_router import create_responses as responses_route
from vllm.entrypoints.openai.responses.protocol import (
    ResponsesRequest,
    ResponsesResponse,
    ResponseUsage,
)
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.serve.engine.protocol import ErrorResponse, UsageInfo
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.middleware import authenticate
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup, validate_json_request
from vllm.exceptions import VLLMError, VLLMNotFoundError, VLLMValidationError
from vllm.logger import configure_logging_from_args
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.utils import CoreEngineProcManager
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from vllm.v1.utils import APIServerProcessManager

__all__ = [
    "APIServerProcessManager",
    "AnthropicError",
    "AnthropicMessagesRequest",
    "AnthropicMessagesResponse",
    "AnthropicServingMessages",
    "AnthropicStreamEvent",
    "AnthropicUsage",
    "BaseModelPath",
    "BatchChatCompletionRequest",
    "ChatCompletionRequest",
    "ChatCompletionResponse",
    "ChatCompletionResponseChoice",
    "CompletionRequest",
    "CompletionResponse",
    "CompletionResponseChoice",
    "CoreEngineProcManager",
    "EngineArgs",
    "EngineCoreRequest",
    "EngineDeadError",
    "ErrorResponse",
    "FlexibleArgumentParser",
    "MsgpackDecoder",
    "MsgpackEncoder",
    "OpenAIServingChat",
    "OpenAIServingChatBatch",
    "OpenAIServingCompletion",
    "OpenAIServingModels",
    "OpenAIServingResponses",
    "RequestOutputKind",
    "ResponseUsage",
    "ResponsesRequest",
    "ResponsesResponse",
    "SamplingParams",
    "ServeSubcommand",
    "UsageInfo",
    "VLLMError",
    "VLLMNotFoundError",
    "VLLMValidationError",
    "api_server",
    "authenticate",
    "batch_route",
    "chat_route",
    "cli_env_setup",
    "completion_route",
    "configure_logging_from_args",
    "create_error_response",
    "current_platform",
    "make_arg_parser",
    "messages_route",
    "offline_engine",
    "responses_route",
    "validate_json_request",
    "validate_parsed_serve_args",
]


def offline_engine(args: Namespace) -> Any:
    """vLLM's `LLM` of the engine options in `args`. Imported here: a server does without."""
    from vllm import LLM

    return LLM.from_engine_args(EngineArgs.from_cli_args(args))
