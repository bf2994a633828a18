"""Request and response models: vLLM's, with the depth fields, as OpenAPI shows them."""

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, model_validator

from ouro_runtime.config import DEPTH_FIELDS
from ouro_server.depth import REQUEST_FIELDS
from ouro_server.usage import DepthUsage
from ouro_server.vllm_api import (
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatCompletionResponseChoice,
    CompletionRequest,
    CompletionResponse,
    CompletionResponseChoice,
    ResponsesRequest,
    SamplingParams,
    UsageInfo,
)


class DepthFields(BaseModel):
    """A request's depth controls. The route has checked the raw values before (`depth.py`)."""

    exit_threshold: float | None = Field(
        default=None,
        ge=0,
        le=1,
        strict=True,
        description="A token leaves the loop as soon as the gate's cumulative exit probability "
        "reaches this; 1 runs every loop. Default: the server's.",
    )
    min_loops: int | None = Field(
        default=None, ge=1, strict=True, description="Least depth of a token, from 1 to T."
    )
    max_loops: int | None = Field(
        default=None, ge=1, strict=True, description="Greatest depth of a token, from 1 to T."
    )
    exit_mode: Literal["skip", "exact"] | None = Field(
        default=None,
        description="`skip`: the loops after the exit are not run. `exact`: they are run off the "
        "read-out, so later tokens see the K/V of the full model; nothing is saved.",
    )

    @model_validator(mode="before")
    @classmethod
    def _out_of_xargs(cls, data: Any) -> Any:
        """Depth fields inside `vllm_xargs` become top-level ones; their types survive there."""
        nested = data.get("vllm_xargs") if isinstance(data, dict) else None
        if not isinstance(nested, dict):
            return data
        moved = {k: nested[k] for k in REQUEST_FIELDS if k in nested and data.get(k) is None}
        rest = {k: v for k, v in nested.items() if k not in REQUEST_FIELDS}
        return {**data, **moved, "vllm_xargs": rest or None}

    def to_sampling_params(self, *args: Any, **kwargs: Any) -> SamplingParams:
        """vLLM's sampling params, the depth controls in `extra_args`."""
        params: SamplingParams = super().to_sampling_params(*args, **kwargs)  # type: ignore[misc]
        controls = {k: getattr(self, k) for k in DEPTH_FIELDS if getattr(self, k) is not None}
        if controls:
            params.extra_args = {**(params.extra_args or {}), **controls}
        return params


class ReturnDepths(BaseModel):
    """For endpoints that can return the depth of every token."""

    return_depths: bool | None = Field(
        default=None,
        strict=True,
        description="Return `choices[i].depths`, one integer per generated token.",
    )


class DepthChatRequest(DepthFields, ReturnDepths, ChatCompletionRequest):
    """vLLM's chat completion request with depth controls."""

    field_names: ClassVar[set[str] | None] = None


class DepthCompletionRequest(DepthFields, ReturnDepths, CompletionRequest):
    """vLLM's completion request with depth controls."""

    field_names: ClassVar[set[str] | None] = None


class DepthResponsesRequest(DepthFields, ResponsesRequest):
    """vLLM's Responses request with depth controls."""

    field_names: ClassVar[set[str] | None] = None


class DepthUsageInfo(UsageInfo):
    """Token usage with depth."""

    depth: DepthUsage | None = None


class ChoiceDepths(BaseModel):
    """What a choice says about depth."""

    depths: list[int] | None = Field(
        default=None,
        description="The loop each generated token was read out at; only with `return_depths`.",
    )


class DepthChatChoice(ChoiceDepths, ChatCompletionResponseChoice):
    """A chat choice with depths."""


class DepthCompletionChoice(ChoiceDepths, CompletionResponseChoice):
    """A completion choice with depths."""


class DepthChatResponse(ChatCompletionResponse):
    """The chat completion as it is sent (documentation; vLLM builds the object)."""

    choices: list[DepthChatChoice]  # type: ignore[assignment]
    usage: DepthUsageInfo


class DepthCompletionResponse(CompletionResponse):
    """The completion as it is sent (documentation; vLLM builds the object)."""

    choices: list[DepthCompletionChoice]  # type: ignore[assignment]
    usage: DepthUsageInfo


class DepthDefaults(BaseModel):
    """Depth controls of a request that sets none."""

    exit_threshold: float
    min_loops: int
    max_loops: int
    exit_mode: str


class DepthInfo(BaseModel):
    """`GET /v1/depth`: what the served model's loops are."""

    object: Literal["depth"] = "depth"
    model: str = Field(description="Name under which the model is served.")
    loops: int = Field(description="T: loops of the model, the greatest depth of a token.")
    modes: list[str] = Field(description="Values that `exit_mode` may take.")
    defaults: DepthDefaults
