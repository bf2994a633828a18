"""The routes that replace vLLM's.

A replaced route resolves the request's depth, then calls vLLM's own function: cancellation when a
client leaves, load tracking, headers and keep-alives are vLLM's.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.responses import Response

from ouro_server import depth
from ouro_server.honest_status import progress_of_request, reads_requests
from ouro_server.json_body import check_body
from ouro_server.schemas import (
    DepthBatchRequest,
    DepthChatRequest,
    DepthChatResponse,
    DepthCompletionRequest,
    DepthCompletionResponse,
    DepthMessagesRequest,
    DepthMessagesResponse,
    DepthResponsesRequest,
    DepthResponsesResponse,
)
from ouro_server.served import ServedDepth
from ouro_server.vllm_api import (
    ErrorResponse,
    authenticate,
    batch_route,
    chat_route,
    completion_route,
    messages_route,
    responses_route,
    validate_json_request,
)

OTHER_ENDPOINTS = (
    "/cohere/v2/chat",
    "/generative_scoring",
    "/inference/v1/generate",
    "/v1/chat/completions/render",
    "/v1/completions/render",
    "/v1/messages/render",
    "/v1/responses/render",
    "/v1/systemone",
)
"""vLLM's endpoints that run or render a request but know no depth: they refuse depth fields."""

INVOCATIONS = "/invocations"
"""vLLM's endpoint that takes a chat or a completion; `serving.deepened` gives it its depth."""

READING_ENDPOINTS = (
    "/detokenize",
    "/tokenize",
    "/v1/load_lora_adapter",
    "/v1/messages/count_tokens",
    "/v1/unload_lora_adapter",
)
"""vLLM's endpoints that take a body to which depth means nothing."""

ADAPTERS = "/adapters"
"""Where SageMaker loads and unloads adapters; its routes come after ours."""

OPEN = (
    "/detokenize",
    "/docs",
    "/health",
    "/load",
    "/metrics",
    "/openapi.json",
    "/ping",
    "/playground",
    "/ready",
    "/redoc",
    "/static",
    "/tokenize",
    "/version",
)
"""How the paths begin that need no key: they neither generate nor change anything."""

ELASTIC_ENDPOINTS = ("/is_scaling_elastic_ep", "/scale_elastic_ep")
"""vLLM's endpoints that add engines for experts, which no looped model has."""

CHECKS = [Depends(reads_requests), Depends(validate_json_request), Depends(check_body)]
"""What every endpoint that reads a client's body begins with."""


def served_by(request: Request) -> ServedDepth | None:
    """The served model's depth; None for a model that has no loops."""
    return request.app.state.depth


def resolving(endpoint: depth.Endpoint) -> Callable[[Request], Awaitable[None]]:
    """A dependency that notes the depth and the model the body means; 400 for a depth that cannot
    be honoured."""

    async def resolve_depth(raw_request: Request) -> None:
        body = await raw_request.json()
        resolved = depth.read_request(body, served_by(raw_request), endpoint)
        raw_request.state.depth = progress_of_request().resolved = resolved
        raw_request.state.model = body.get("model") if isinstance(body, dict) else None

    return resolve_depth


async def refuse_depth(raw_request: Request) -> None:
    """400 if the body says anything of depth: this endpoint would ignore it."""
    try:
        body = await raw_request.json()
    except ValueError:
        return
    if isinstance(body, dict):
        depth.refuse_everything(body, served_by(raw_request))


async def check_invocation(raw_request: Request) -> None:
    """400 that names the field, for a chat or completion that is wrong. vLLM would take the chat
    for a completion without a prompt."""
    body = await raw_request.json()
    if not isinstance(body, dict):
        return
    chat = body.get("messages") is not None
    try:
        (DepthChatRequest if chat else DepthCompletionRequest).model_validate(body)
    except ValidationError as error:
        told = [{**one, "loc": ("body", *one["loc"])} for one in error.errors(include_url=False)]
        raise RequestValidationError(told, body=body) from None


def _responses(model: Any) -> dict[int | str, dict[str, Any]]:
    errors: dict[int | str, dict[str, Any]] = {
        code: {"model": ErrorResponse} for code in (400, 404, 500, 503)
    }
    return {200: {"model": model, "content": {"text/event-stream": {}}}, **errors}


def build_router() -> APIRouter:
    """The routes with depth."""
    router = APIRouter()

    def route(path: str, endpoint: depth.Endpoint, model: Any) -> Any:
        checks = [*CHECKS, Depends(resolving(endpoint))]
        responses = _responses(model)
        return router.post(path, dependencies=checks, responses=responses, response_model=None)

    @route("/v1/chat/completions", depth.COMPLETIONS, DepthChatResponse)
    async def create_chat_completion(request: DepthChatRequest, raw_request: Request) -> Response:
        request.resolve(raw_request.state.depth)
        return await chat_route(request, raw_request)

    @route("/v1/chat/completions/batch", depth.COMPLETIONS, DepthChatResponse)
    async def create_batch(request: DepthBatchRequest, raw_request: Request) -> Response:
        request.resolve(raw_request.state.depth)
        return await batch_route(request, raw_request)

    @route("/v1/completions", depth.COMPLETIONS, DepthCompletionResponse)
    async def create_completion(request: DepthCompletionRequest, raw_request: Request) -> Response:
        request.resolve(raw_request.state.depth)
        return await completion_route(request, raw_request)

    @route("/v1/responses", depth.RESPONSES, DepthResponsesResponse)
    async def create_responses(request: DepthResponsesRequest, raw_request: Request) -> Response:
        request.resolve(raw_request.state.depth)
        return await responses_route(request, raw_request)

    @route("/v1/messages", depth.MESSAGES, DepthMessagesResponse)
    async def create_messages(request: DepthMessagesRequest, raw_request: Request) -> Response:
        request.resolve(raw_request.state.depth)
        return await messages_route(request, raw_request)

    return router


def guard_others(app: FastAPI) -> None:
    """Check the bodies of vLLM's other endpoints; those that run one refuse depth fields, but for
    the one whose bodies are those of chats and completions."""
    checks = dict.fromkeys(READING_ENDPOINTS, CHECKS)
    reads = (resolving(depth.COMPLETIONS), check_invocation)
    checks[INVOCATIONS] = [*CHECKS, *map(Depends, reads)]
    checks |= {path: [*CHECKS, Depends(refuse_depth)] for path in OTHER_ENDPOINTS}
    for route in list(app.routes):
        if isinstance(route, APIRoute) and route.path in checks:
            app.add_api_route(
                route.path,
                route.endpoint,
                methods=list(route.methods),
                name=route.name,
                responses=route.responses,
                response_model=route.response_model,
                response_class=route.response_class,
                dependencies=[*checks[route.path], *route.dependencies],
            )


def ask_for_key(app: FastAPI) -> None:
    """Ask for the key at every route but the `OPEN` ones, whatever vLLM adds: `/invocations`
    generates as `/v1/chat/completions` does, and vLLM asks only at paths that begin like that."""
    guarded = dict.fromkeys((*authenticate.GUARDED_PREFIX, ADAPTERS))
    for route in app.routes:
        path = getattr(route, "path", "")
        fixed = path.partition("{")[0]
        known = any(path == one or path.startswith(f"{one}/") for one in OPEN)
        if not known and fixed.strip("/"):
            guarded[fixed] = None
    authenticate.GUARDED_PREFIX = tuple(guarded)


def drop_elastic(app: FastAPI) -> None:
    """Take out what scales expert parallelism."""
    app.router.routes[:] = [
        route
        for route in app.router.routes
        if not (isinstance(route, APIRoute) and route.path in ELASTIC_ENDPOINTS)
    ]
