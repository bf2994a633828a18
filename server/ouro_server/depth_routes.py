"""`/v1/depth`: what the served model's loops are, and the defaults, which may be changed."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Depends, HTTPException, Request

from ouro_runtime.config import GATE, RULE, RULES, DepthError, check_rule
from ouro_runtime.loop.limits import pages_per_token
from ouro_server.depth import shortened
from ouro_server.honest_status import reads_requests
from ouro_server.json_body import check_body
from ouro_server.schemas import (
    AgreementInfo,
    ClassAgreement,
    ControllerInfo,
    DepthControls,
    DepthDefaults,
    DepthInfo,
    PresetInfo,
    PriorityClassInfo,
    RuleInfo,
)
from ouro_server.served import ServedDepth
from ouro_server.steering import Steering
from ouro_server.vllm_api import ErrorResponse, validate_json_request

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
            check_rule_of(served, fields)
            served.defaults.change(fields)
        except DepthError as error:
            raise shortened(error) from None
        return depth_info(served)

    return router


def check_rule_of(served: ServedDepth, fields: Mapping[str, Any]) -> None:
    """DepthError for an exit rule that no default of this server may have."""
    rule = fields.get(RULE)
    if rule is None or check_rule(rule) == GATE:
        return
    if rule not in served.rules:
        raise DepthError(RULE, f"{RULE} {rule!r} is not supported on CUDA yet, only {GATE!r}")
    if served.steering is not None:
        raise DepthError(
            RULE, f"{RULE} must stay gate: this server's target moves the threshold of that rule"
        )


def depth_info(served: ServedDepth) -> DepthInfo:
    """What `/v1/depth` answers."""
    book, defaults = served.book, served.defaults
    in_force = defaults.for_class(book.default_class)
    pages = pages_per_token(served.loops)
    return DepthInfo(
        model=served.model,
        loops=served.loops,
        modes=list(pages),
        pages_per_token=pages,
        rules={name: RuleInfo(most=RULES[name][0], off=RULES[name][1]) for name in served.rules},
        return_loops=served.reads_loops,
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
        audit=served.audit_share,
        agreement=agreement_info(served.steering),
        gave_way=list(served.steering.gave_way) if served.steering else [],
    )


def controller_info(steering: Steering | None) -> ControllerInfo:
    """The controller's part of it."""
    if steering is None or steering.law is None:
        return ControllerInfo()
    return ControllerInfo(
        active=steering.active,
        target_tpot_ms=1000 * steering.law.target,
        p95_tpot_ms=None if steering.p95 is None else round(1000 * steering.p95, 3),
        pressure=round(steering.pressure, 4),
    )


def agreement_info(steering: Steering | None) -> AgreementInfo:
    """The target agreement's part of it."""
    agreement = steering.agreement if steering else None
    if steering is None or agreement is None:
        return AgreementInfo()
    return AgreementInfo(
        active=steering.active,
        target=agreement.rule.target,
        confidence=agreement.rule.confidence,
        priority_classes={
            name: ClassAgreement(
                proven=agreement.proven(name),
                trial=agreement.trial(name),
                audits=ladder.audits,
                needed=agreement.needed(name),
                lost=ladder.missed,
            )
            for name, ladder in agreement.ladders.items()
        },
    )
