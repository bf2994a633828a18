"""The routes that replace vLLM's, and `GET /v1/depth`.

A replaced route checks the depth controls, then calls vLLM's own function: cancellation when a
client leaves, load tracking, headers and keep-alives are vLLM's.
"""

from typing import Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from ouro_runtime.config import MODES, LoopConfig
from ouro_server import depth
from ouro_server.schemas import (
    DepthChatRequest,
    DepthChatResponse,
    DepthCompletionRequest,
    DepthCompletionResponse,
    DepthDefaults,
    DepthInfo,
    DepthResponsesRequest,
)
from ouro_server.vllm_api import (
    ErrorResponse,
    ResponsesResponse,
    chat_route,
    completion_route,
    responses_route,
    validate_json_request,
)

OTHER_ENDPOINTS = (
    "/cohere/v2/chat",
    "/generative_scoring",
    "/inference/v1/generate",
    "/invocations",
    "/v1/chat/completions/batch",
    "/v1/chat/completions/render",
    "/v1/completions/render",
    "/v1/messages",
    "/v1/messages/render",
    "/v1/responses/render",
    "/v1/systemone",
)
"""vLLM's endpoints that run or render a request but know no depth: they refuse depth fields."""


def loops_of(request: Request) -> LoopConfig | None:
    """The served model's loops; None for a model that has none."""
    return request.app.state.depth_config


async def check_depth(raw_request: Request) -> None:
    """400 unless the body's depth controls can be honoured."""
    depth.check_request(await raw_request.json(), loops_of(raw_request))


async def check_depth_only(raw_request: Request) -> None:
    """As `check_depth`, for an endpoint that cannot return depths."""
    depth.check_request(await raw_request.json(), loops_of(raw_request), depths=False)


async def refuse_depth(raw_request: Request) -> None:
    """400 if the body has a depth control: this endpoint would ignore it."""
    try:
        body = await raw_request.json()
    except ValueError:
        return
    if isinstance(body, dict):
        depth.refuse(depth.find_controls(body), "this endpoint knows no depth")


def _responses(model: Any) -> dict[int | str, dict[str, Any]]:
    errors: dict[int | str, dict[str, Any]] = {
        code: {"model": ErrorResponse} for code in (400, 404, 500)
    }
    return {200: {"model": model, "content": {"text/event-stream": {}}}, **errors}


def build_router() -> APIRouter:
    """The chat, completion and Responses routes with depth, and `GET /v1/depth`."""
    router = APIRouter()
    json_body = Depends(validate_json_request)

    @router.post(
        "/v1/chat/completions",
        dependencies=[json_body, Depends(check_depth)],
        responses=_responses(DepthChatResponse),
        response_model=None,
    )
    async def create_chat_completion(request: DepthChatRequest, raw_request: Request) -> Response:
        return await chat_route(request, raw_request)

    @router.post(
        "/v1/completions",
        dependencies=[json_body, Depends(check_depth)],
        responses=_responses(DepthCompletionResponse),
        response_model=None,
    )
    async def create_completion(request: DepthCompletionRequest, raw_request: Request) -> Response:
        return await completion_route(request, raw_request)

    @router.post(
        "/v1/responses",
        dependencies=[json_body, Depends(check_depth_only)],
        responses=_responses(ResponsesResponse),
        response_model=None,
    )
    async def create_responses(request: DepthResponsesRequest, raw_request: Request) -> Response:
        return await responses_route(request, raw_request)

    @router.get("/v1/depth")
    async def show_depth(raw_request: Request) -> DepthInfo:
        """The served model's loops, the modes it can exit in, and the server's defaults."""
        config = loops_of(raw_request)
        if config is None:
            raise HTTPException(404, "the served model has no loops")
        defaults = DepthDefaults.model_validate(config.defaults, from_attributes=True)
        return DepthInfo(
            model=raw_request.app.state.depth_model,
            loops=config.loops,
            modes=list(MODES),
            defaults=defaults,
        )

    return router


def guard_others(app: FastAPI) -> None:
    """Make the endpoints that know no depth refuse depth fields instead of ignoring them."""
    for route in list(app.routes):
        if isinstance(route, APIRoute) and route.path in OTHER_ENDPOINTS:
            app.add_api_route(
                route.path,
                route.endpoint,
                methods=list(route.methods),
                name=route.name,
                responses=route.responses,
                response_model=route.response_model,
                response_class=route.response_class,
                dependencies=[*route.dependencies, Depends(refuse_depth)],
            )
