"""Errors in OpenAI's error shape."""

from http import HTTPStatus
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from ouro_runtime.config import DepthError
from ouro_server.vllm_api import create_error_response

STOPPED = "the engine has stopped, and the server with it; ask another one, or again later"


def depth_error_body(error: DepthError) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`, `param` naming the field."""
    return create_error_response(str(error), param=error.param).model_dump()


def unavailable_body(message: str) -> dict[str, Any]:
    """OpenAI's body of a 503."""
    kind, status = "ServiceUnavailableError", HTTPStatus.SERVICE_UNAVAILABLE
    return create_error_response(message, kind, status).model_dump()


async def handle_depth_error(_: Request, error: DepthError) -> JSONResponse:
    """A depth control that cannot be honoured is the client's error: 400."""
    return JSONResponse(depth_error_body(error), status_code=400)
