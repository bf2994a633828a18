"""`/v1/depth`: what the served model's loops are, and the defaults, which may be changed."""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Depends, HTTPException, Request

from ouro_runtime.config import DepthError
from ouro_runtime.loop.limits import pages_per_token
from ouro_server.depth import shortened
from ouro_server.honest_status import reads_requests
from ouro_server.json_body import check_body
from ouro_server.schemas import (
    ControllerInfo,
    DepthControls,
    DepthDefaults,
    DepthInfo,
    PresetInfo,
    PriorityClassInfo,
)
from ouro_server.served import ServedDepth
from ouro_server.steering import Steering
from ouro_server.vllm_api import ErrorResponse, current_platform, validate_json_request

_CHANGE: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": DepthControls.model_json_schema()}},
    }
}
"""The body of `PUT /v1/depth` for OpenAPI. The raw JSON is checked, as a request's is."""


def served_with_loops(request: Request) -> ServedDepth:
    """The served model's depth; 404 for a model that has no loops."""
    served = request.app.state.depth
    if served is None:
        raise HTTPException(404, "the served model has no loops")
    return served


def build_depth_router() -> APIRouter:
    """`GET` and `PUT /v1/depth`."""
    router = APIRouter()

    @router.get("/v1/depth", responses={404: {"model": ErrorResponse}})
    async def show_depth(raw_request: Request) -> DepthInfo:
        """The served model's loops, what requests may ask of them, and the defaults in force."""
        return depth_info(served_with_loops(raw_request))

    @router.put(
        "/v1/depth",
        dependencies=[Depends(reads_requests), Depends(validate_json_request), Depends(check_body)],
        responses={code: {"model": ErrorResponse} for code in (400, 403, 404, 409)},
        openapi_extra=_CHANGE,
    )
    async def change_depth(raw_request: Request) -> DepthInfo:
        """Change some of the server's defaults, all or none; returns what is in force then."""
        served = served_with_loops(raw_request)
        if served.fixed is not None:
            raise HTTPException(*served.fixed)
        fields = await raw_request.json()
        if not isinstance(fields, dict):
            raise HTTPException(400, "the body must be an object of depth controls")
        try:
            served.defaults.change(fields)
        except DepthError as error:
            raise shortened(error) from None
        return depth_info(served)

    return router


def depth_info(served: ServedDepth) -> DepthInfo:
    """What `/v1/depth` answers."""
    book, defaults = served.book, served.defaults
    in_force = defaults.for_class(book.default_class)
    pages = pages_per_token(served.loops, by_loop=current_platform.is_cpu())
    return DepthInfo(
        model=served.model,
        loops=served.loops,
        modes=list(pages),
        pages_per_token=pages,
        drafts=served.drafts,
        defaults=DepthDefaults.model_validate(asdict(in_force)),
        presets={
            name: PresetInfo(description=preset.description, **preset.controls)
            for name, preset in book.presets.items()
        },
        reasoning_effort=dict(book.efforts),
        aliases=dict(served.aliases),
        priority_classes={
            name: PriorityClassInfo(
                floor=floor, exit_threshold=defaults.for_class(name).exit_threshold
            )
            for name, floor in book.floors.items()
        },
        default_priority_class=book.default_class,
        controller=controller_info(served.steering),
    )


def controller_info(steering: Steering | None) -> ControllerInfo:
    """The controller's part of it."""
    if steering is None:
        return ControllerInfo()
    return ControllerInfo(
        active=steering.active,
        target_tpot_ms=1000 * steering.law.target,
        p95_tpot_ms=None if steering.p95 is None else round(1000 * steering.p95, 3),
        pressure=round(steering.pressure, 4),
    )
