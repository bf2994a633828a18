"""Request and response models: vLLM's, with the depth fields, as OpenAPI shows them."""

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, PrivateAttr, model_validator

from ouro_runtime.config import MODES, MOST_GUESSES, RETURN_LOOPS, RULES
from ouro_server.depth import REQUEST_FIELDS, SESSION
from ouro_server.presets import EFFORTS
from ouro_server.resolve import Resolved
from ouro_server.usage import DepthUsage
from ouro_server.vllm_api import (
    AnthropicMessagesRequest,
    AnthropicMessagesResponse,
    AnthropicUsage,
    BatchChatCompletionRequest,
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatCompletionResponseChoice,
    CompletionRequest,
    CompletionResponse,
    CompletionResponseChoice,
    ResponsesRequest,
    ResponsesResponse,
    ResponseUsage,
    SamplingParams,
    UsageInfo,
)


class DepthControls(BaseModel):
    """The depth controls, each of which may be left out."""

    exit_threshold: float | None = Field(
        default=None,
        ge=0,
        le=max(most for most, _ in RULES.values()),
        strict=True,
        description="Of `exit_rule`, in its own unit. `gate` and `margin`: a token leaves the loop "
        "as soon as what the rule reads reaches this, 0 to 1; 1 runs every loop. `delta`: as soon "
        "as it is no more than this, 0 to 2; 0 runs every loop.",
    )
    min_loops: int | None = Field(
        default=None, ge=1, strict=True, description="Least depth of a token, from 1 to T."
    )
    max_loops: int | None = Field(
        default=None, ge=1, strict=True, description="Greatest depth of a token, from 1 to T."
    )
    exit_mode: Literal[MODES] | None = Field(  # type: ignore[valid-type]
        default=None,
        description="`skip`: the loops after the exit are not run. `shared`: the same over one K/V "
        "for all loops, which saves memory and changes answers. `exact`: they are run off the "
        "read-out, so later tokens see the K/V of the full model; nothing is saved. `lossless`: "
        "the token read out at the exit is a draft, which the last loop confirms or takes back, so "
        "the answer is that of every loop. `auto`: `lossless` where every loop is asked for, else "
        "`skip`.",
    )
    exit_rule: Literal[tuple(RULES)] | None = Field(  # type: ignore[valid-type]
        default=None,
        description="What a token leaves by. `gate`: the gate's cumulative exit probability. "
        "`margin`: the gap between the two largest probabilities of the loop's own read-out. "
        "`delta`: the relative change of the state since the loop before. A rule that is not the "
        "default one comes with its `exit_threshold`. On CUDA: `gate`.",
    )


class DepthFields(DepthControls):
    """A request's depth fields. The route has checked the raw values before (`depth.py`)."""

    depth_preset: str | None = Field(
        default=None,
        description="Name of a preset, which sets depth controls. `GET /v1/depth` lists them.",
    )
    priority_class: str | None = Field(
        default=None,
        description="Name of a priority class: how far the latency controller may lower the "
        "threshold of a request that sets no depth itself. `GET /v1/depth` lists them.",
    )
    _resolved: Resolved | None = PrivateAttr(default=None)
    _alias: str | None = PrivateAttr(default=None)

    @property
    def resolved(self) -> Resolved | None:
        """The depth this request means; None for a model without loops."""
        return self._resolved

    def resolve(self, resolved: Resolved | None) -> None:
        """Settle the depth this request means."""
        self._resolved = resolved

    @property
    def alias(self) -> str | None:
        """The NAME@PRESET that the request asked for, if its model was one."""
        return self._alias

    def ask_for(self, model: str) -> None:
        """Ask vLLM for the model that the alias stands for."""
        self._alias, self.model = self.model, model  # type: ignore[has-type]

    @model_validator(mode="before")
    @classmethod
    def _out_of_xargs(cls, data: Any) -> Any:
        """Fields inside `vllm_xargs` that have a place at the top level go there, types kept."""
        nested = data.get("vllm_xargs") if isinstance(data, dict) else None
        if not isinstance(nested, dict):
            return data
        ours = (*REQUEST_FIELDS, *((SESSION,) if SESSION in cls.model_fields else ()))
        moved = {k: nested[k] for k in ours if k in nested and data.get(k) is None}
        rest = {k: v for k, v in nested.items() if k not in ours}
        return {**data, **moved, "vllm_xargs": rest or None}

    def to_sampling_params(self, *args: Any, **kwargs: Any) -> SamplingParams:
        """vLLM's sampling params, all depth controls in `extra_args`."""
        params: SamplingParams = super().to_sampling_params(*args, **kwargs)  # type: ignore[misc]
        if self.resolved is not None:
            params.extra_args = {**(params.extra_args or {}), **self.resolved.controls()}
            if (most := getattr(self, RETURN_LOOPS, None)) is not None:
                params.extra_args[RETURN_LOOPS] = most
        return params


class ReturnFields(BaseModel):
    """For endpoints that can say something of every token."""

    return_depths: bool | None = Field(
        default=None,
        strict=True,
        description="Return `choices[i].depths`, one integer per generated token.",
    )
    return_drafts: bool | None = Field(
        default=None,
        strict=True,
        description="Return `choices[i].drafts`, one integer per generated token.",
    )
    return_exit_cdf: bool | None = Field(
        default=None,
        strict=True,
        description="Return `choices[i].exit_cdf`, one list of numbers per generated token.",
    )
    return_loops: int | None = Field(
        default=None,
        strict=True,
        ge=1,
        le=MOST_GUESSES,
        description="Return `choices[i].loops`: for every generated token and every loop that ran, "
        "as many of the likeliest tokens. Not on CUDA.",
    )


class EffortField(BaseModel):
    """For requests to which vLLM gives no effort."""

    reasoning_effort: Literal[EFFORTS] | None = Field(  # type: ignore[valid-type]
        default=None, description="Chooses a depth preset, as it does in a chat."
    )


class DepthChatRequest(DepthFields, ReturnFields, ChatCompletionRequest):
    """vLLM's chat completion request with depth controls."""

    field_names: ClassVar[set[str] | None] = None


class DepthCompletionRequest(DepthFields, EffortField, ReturnFields, CompletionRequest):
    """vLLM's completion request with depth controls."""

    field_names: ClassVar[set[str] | None] = None


class DepthResponsesRequest(DepthFields, ResponsesRequest):
    """vLLM's Responses request with depth controls."""

    field_names: ClassVar[set[str] | None] = None


class DepthBatchRequest(DepthFields, EffortField, ReturnFields, BatchChatCompletionRequest):
    """vLLM's request of several chats at once with depth controls, which are those of each."""

    field_names: ClassVar[set[str] | None] = None

    def to_chat_completion_request(self, messages: Any) -> DepthChatRequest:
        """The request of one of the chats."""
        data = self.model_dump(exclude={"messages"}, exclude_none=True)
        chat = DepthChatRequest.model_validate({**data, "messages": messages})
        chat.resolve(self.resolved)
        return chat


class DepthMessagesRequest(DepthFields, AnthropicMessagesRequest):
    """vLLM's Messages request with depth controls."""


class DepthUsageInfo(UsageInfo):
    """Token usage with depth."""

    depth: DepthUsage | None = None


class LoopGuess(BaseModel):
    """A token that a loop would have said."""

    token: str | None = Field(description="Its text; null without a tokenizer.")
    token_id: int
    logprob: float = Field(description="Before temperature, penalties and the like.")


class ChoiceDepths(BaseModel):
    """What a choice says about depth."""

    depths: list[int] | None = Field(
        default=None,
        description="The loop each generated token was read out at; only with `return_depths`.",
    )
    drafts: list[int] | None = Field(
        default=None,
        description="The loop each generated token was drafted at in `lossless`, 0 if it was not: "
        "where that is not its depth, the draft was taken back; only with `return_drafts`.",
    )
    exit_cdf: list[list[float]] | None = Field(
        default=None,
        description="Per generated token, the gate's cumulative exit probability after each loop "
        "up to the one it was read out at; only with `return_exit_cdf`.",
    )
    loops: list[list[list[LoopGuess]]] | None = Field(
        default=None,
        description="Per generated token, per loop up to the one that had the last word, the "
        "likeliest tokens, likeliest first; only with `return_loops`.",
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


class DepthResponsesUsage(ResponseUsage):
    """Token usage with depth."""

    depth: DepthUsage | None = None


class DepthResponsesResponse(ResponsesResponse):
    """The response as it is sent (documentation; vLLM builds the object)."""

    usage: DepthResponsesUsage | None = None


class DepthMessagesUsage(AnthropicUsage):
    """Token usage with depth."""

    depth: DepthUsage | None = None


class DepthMessagesResponse(AnthropicMessagesResponse):
    """The message as it is sent."""

    usage: DepthMessagesUsage | None = None


class DepthDefaults(BaseModel):
    """Depth controls of a request that sets none."""

    exit_threshold: float
    min_loops: int
    max_loops: int
    exit_mode: str
    exit_rule: str


class RuleInfo(BaseModel):
    """The unit of an exit rule's threshold."""

    most: float = Field(description="The largest threshold; the least is 0.")
    off: float = Field(description="The threshold at which every loop runs.")


class PresetInfo(DepthControls):
    """What a preset sets; null is left to the server's defaults."""

    description: str


class PriorityClassInfo(BaseModel):
    """What requests of one priority class get."""

    floor: float = Field(description="Lowest threshold the latency controller may choose for it.")
    exit_threshold: float = Field(description="Threshold in force for requests that set no depth.")


class ControllerInfo(BaseModel):
    """The latency controller."""

    active: bool = Field(default=False, description="Whether it moves the default thresholds.")
    target_tpot_ms: float | None = Field(
        default=None, description="The p95 time per output token it holds, in milliseconds."
    )
    p95_tpot_ms: float | None = Field(
        default=None, description="What it last read; null without tokens in the last seconds."
    )
    pressure: float | None = Field(
        default=None, description="How much depth is given up: 0 none, 1 down to every floor."
    )


class ClassAgreement(BaseModel):
    """What audits say of one priority class."""

    proven: float = Field(description="The lowest threshold that they allow for all its requests.")
    trial: float | None = Field(
        description="The threshold that requests picked for an audit are served at, to try it; "
        "null while none is tried."
    )
    audits: int = Field(description="Audits of the running test.")
    needed: int = Field(description="Audits that it takes.")
    lost: int = Field(description="Answers among them that are not those of full depth.")


class AgreementInfo(BaseModel):
    """The target agreement."""

    active: bool = Field(default=False, description="Whether it moves the default thresholds.")
    target: float | None = Field(
        default=None, description="The share of answers that shall be those of full depth."
    )
    confidence: float | None = Field(default=None, description="That of a proven threshold.")
    priority_classes: dict[str, ClassAgreement] = Field(default_factory=dict)


class DepthInfo(BaseModel):
    """`GET /v1/depth`: what the served model's loops are, and what may be asked of them."""

    object: Literal["depth"] = "depth"
    model: str = Field(description="Name under which the model is served.")
    loops: int = Field(description="T: loops of the model, the greatest depth of a token.")
    modes: list[str] = Field(description="Values that `exit_mode` may take.")
    pages_per_token: dict[str, int] = Field(
        description="By mode, the loops whose K/V a generated position holds, of a request whose "
        "`max_loops` is T. A smaller one in `skip` and `exact` holds that many."
    )
    rules: dict[str, RuleInfo] = Field(description="Values that `exit_rule` may take.")
    return_loops: bool = Field(description="Whether `return_loops` is honoured; not on CUDA.")
    drafts: bool = Field(
        description="Whether `lossless` requests are drafted; false with `--no-drafts`."
    )
    defaults: DepthDefaults = Field(
        description="Controls in force for a request that sets none and names no priority class."
    )
    presets: dict[str, PresetInfo] = Field(description="Values of `depth_preset`.")
    reasoning_effort: dict[str, str] = Field(
        description="Preset that each value of `reasoning_effort` chooses."
    )
    aliases: dict[str, str] = Field(description="Preset that each alias of the model chooses.")
    priority_classes: dict[str, PriorityClassInfo] = Field(
        description="Values of `priority_class`."
    )
    default_priority_class: str | None = Field(
        description="Class of a request that names none; null if there are no classes."
    )
    controller: ControllerInfo
    audit: float = Field(description="Share of the requests that skip which is audited.")
    agreement: AgreementInfo
    gave_way: list[str] = Field(
        description="Targets that are missed: `latency` since the agreement allows no lower "
        "threshold, `agreement` since the operator's default already loses more."
    )
