"""What a server and a request say about loops.

`LoopConfig` holds the server's defaults. `ExitParams` are one request's depth controls. Both are
validated once, here, and trusted everywhere else; what a checkpoint says is in
`checkpoint_config.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ouro_runtime.checkpoint_config import check_config, is_integer, is_number

AUTO, SHARED, LOSSLESS = "auto", "shared", "lossless"
MODES = (AUTO, "skip", "exact", SHARED, LOSSLESS)
"""Exit modes a request may choose. `auto` is `lossless` where every loop is asked for, else
`skip`; `shared` is `skip` with one K/V for all loops."""

GATE, MARGIN, DELTA = "gate", "margin", "delta"
RULES: Mapping[str, tuple[float, float]] = {GATE: (1.0, 1.0), MARGIN: (1.0, 1.0), DELTA: (2.0, 0.0)}
"""Exit rules (`exit/policy.py`): the largest threshold of each, the least being 0, and the one that
turns the rule off."""

THRESHOLD, RULE = "exit_threshold", "exit_rule"
DEPTH_FIELDS = (THRESHOLD, "min_loops", "max_loops", "exit_mode", RULE)
FORCED = "forced_depths"
DRAFTS = "drafts"
"""The server's setting that turns drafts off."""

RETURN_LOOPS = "return_loops"
MOST_GUESSES = 20
"""Likeliest tokens a loop that a request may ask for: vLLM's own limit of log-probabilities."""


class DepthError(ValueError):
    """A depth control that cannot be honoured.

    `param` names the field; the message says what was given and what is allowed.
    """

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class ExitParams:
    """A request's depth controls, complete and valid for a model of `T` loops.

    Attributes:
        exit_threshold: of `exit_rule`, in its own unit, see `RULES`; turned off, `max_loops` loops
            run.
        min_loops, max_loops: bounds on the depth of every generated token, 1..T; in `lossless`, of
            every draft.
        exit_mode: `skip` (deeper loops are not run), `exact` (they run later, off the read-out),
            `lossless` (they run later, and the last one has the last word), or `auto`.
        forced_depths: if not empty, token i is read out at `forced_depths[i % len]`, whatever the
            gate says; in `lossless`, drafted there. For benchmarks and tests; values 1..T.
        exit_rule: what a token leaves by: `gate`, when the gate's cumulative exit probability
            reaches the threshold; `margin`, when the gap between the two largest probabilities of
            the loop's own read-out does; `delta`, when the state changed by no more than it since
            the loop before.
        guided: nobody gave a threshold for this request: in `lossless`, the server's rule says
            where to draft.
    """

    exit_threshold: float
    min_loops: int
    max_loops: int
    exit_mode: str
    forced_depths: tuple[int, ...] = ()
    exit_rule: str = GATE
    guided: bool = field(default=False, compare=False)

    def threshold_of(self, rule: str) -> float:
        """The threshold of an exit rule; the one that turns it off if it is not this request's, and
        where depths are forced."""
        own = rule == self.exit_rule and not self.forced_depths
        return self.exit_threshold if own else RULES[rule][1]

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None, defaults: ExitParams, loops: int) -> ExitParams:
        """Depth controls of a request whose `extra_args` are `given`.

        Unset (absent or None) fields come from `defaults`. Where only one of `min_loops` and
        `max_loops` is set, the other default yields to it.

        Raises:
            DepthError: naming the first field that is wrong.
        """
        given = given or {}
        picked = {k: given[k] for k in DEPTH_FIELDS if given.get(k) is not None}
        rule = check_rule(picked.get(RULE, defaults.exit_rule))
        if THRESHOLD in picked:
            picked[THRESHOLD] = check_threshold(picked[THRESHOLD], rule=rule)
        elif rule != defaults.exit_rule:
            raise DepthError(
                THRESHOLD,
                f"{THRESHOLD} must be set with {RULE} {rule!r}: the default one is of "
                f"{defaults.exit_rule!r}, whose unit is another",
            )
        for name in ("min_loops", "max_loops"):
            if name in picked:
                picked[name] = check_loops(name, picked[name], loops)
        if "exit_mode" in picked:
            check_mode(picked["exit_mode"])
        if "min_loops" in picked and "max_loops" not in picked:
            picked["max_loops"] = max(defaults.max_loops, picked["min_loops"])
        if "max_loops" in picked and "min_loops" not in picked:
            picked["min_loops"] = min(defaults.min_loops, picked["max_loops"])
        params = replace(defaults, **picked)
        if params.min_loops > params.max_loops:
            raise DepthError(
                "min_loops",
                f"min_loops ({params.min_loops}) must not exceed max_loops ({params.max_loops})",
            )
        forced = given.get(FORCED)
        if forced is not None:
            if not isinstance(forced, (list, tuple)) or not forced:
                raise DepthError(FORCED, f"{FORCED} must be a non-empty list")
            depths = tuple(check_loops(FORCED, d, loops) for d in forced)
            params = replace(params, forced_depths=depths)
        if forced is not None or THRESHOLD in picked:
            params = replace(params, guided=False)
        return params

    def settled(self, loops: int) -> ExitParams:
        """With the mode that `auto` stands for, of a model of `loops` loops."""
        if self.exit_mode != AUTO:
            return self
        off = self.exit_threshold == RULES[self.exit_rule][1]
        if off and self.max_loops == loops and not self.forced_depths:
            return replace(self, exit_mode=LOSSLESS, guided=True)
        return replace(self, exit_mode="skip")

    def controls(self) -> dict[str, Any]:
        """The controls that `parse` makes these of again, but for forced depths."""
        unsaid = {THRESHOLD, RULE} if self.guided and self.exit_mode == LOSSLESS else set()
        return {name: getattr(self, name) for name in DEPTH_FIELDS if name not in unsaid}


@dataclass(frozen=True)
class LoopConfig:
    """The served model's number of loops T, and the depth controls of a request that sets none.

    Attributes:
        drafts: whether a lossless request may be drafted; else its tokens only run every loop.
    """

    loops: int
    defaults: ExitParams
    drafts: bool = True

    @classmethod
    def of(cls, vllm_config: Any) -> LoopConfig:
        """Of a vLLM configuration: its model's config and `additional_config["ouro"]`."""
        additional = vllm_config.additional_config
        given = additional.get("ouro") if isinstance(additional, dict) else None
        return cls.parse(vllm_config.model_config.hf_config, given)

    @classmethod
    def parse(cls, hf_config: Any, given: Mapping[str, Any] | None = None) -> LoopConfig:
        """From a checkpoint's config and the server's own settings (`additional_config["ouro"]`).

        Raises:
            ConfigError: for a checkpoint's field that is wrong.
            DepthError: naming the setting that is wrong, also for an unknown one.
        """
        loops: Any = getattr(hf_config, "total_ut_steps", None)
        threshold = getattr(hf_config, "early_exit_threshold", None)
        check_config({"total_ut_steps": loops, "early_exit_threshold": threshold})
        given = dict(given or {})
        known = (*DEPTH_FIELDS, DRAFTS)
        for name in given:
            if name not in known:
                raise DepthError(
                    name, f"unknown setting {name!r} of ouro; known are {', '.join(known)}"
                )
        drafts = check_drafts(given.pop(DRAFTS, True))
        threshold = 1.0 if threshold is None else min(float(threshold), 1.0)
        built_in = ExitParams(threshold, 1, loops, AUTO)
        defaults = ExitParams.parse(given, built_in, loops)
        return cls(loops, replace(defaults, guided=True), drafts)

    def request(self, given: Mapping[str, Any] | None) -> ExitParams:
        """Depth controls of a request whose `extra_args` are `given`, its mode settled.

        Raises:
            DepthError: naming the first field that is wrong.
        """
        params = ExitParams.parse(given, self.defaults, self.loops).settled(self.loops)
        if params.exit_mode == LOSSLESS and not self.drafts:
            return ExitParams(1.0, 1, self.loops, LOSSLESS)
        return params


def check_threshold(value: Any, param: str = THRESHOLD, rule: str = GATE) -> float:
    """`value` as a threshold of an exit rule; DepthError unless a number in its range."""
    most, _ = RULES[rule]
    if not is_number(value) or not 0 <= value <= most:
        unit = "" if rule == GATE else f" with {RULE} {rule!r}"
        raise DepthError(param, f"{param} must be a number from 0 to {most:g}{unit}, got {value!r}")
    return float(value)


def check_rule(value: Any, param: str = RULE) -> str:
    """`value` as an exit rule; DepthError unless one of `RULES`."""
    if not isinstance(value, str) or value not in RULES:
        raise DepthError(param, f"{param} must be one of {', '.join(RULES)}, got {value!r}")
    return value


def check_loops(param: str, value: Any, loops: int) -> int:
    """`value` as a number of loops; DepthError unless an integer from 1 to `loops`."""
    if not is_integer(value) or not 1 <= value <= loops:
        raise DepthError(param, f"{param} must be an integer from 1 to {loops}, got {value!r}")
    return value


def check_guesses(value: Any) -> int:
    """`value` as a request's `return_loops`; DepthError unless an integer from 1 to
    `MOST_GUESSES`."""
    if not is_integer(value) or not 1 <= value <= MOST_GUESSES:
        raise DepthError(
            RETURN_LOOPS,
            f"{RETURN_LOOPS} must be an integer from 1 to {MOST_GUESSES} (likeliest tokens a "
            f"loop), got {value!r}",
        )
    return value


def check_drafts(value: Any) -> bool:
    """`value` as the server's setting `drafts`; DepthError unless true or false."""
    if not isinstance(value, bool):
        raise DepthError(DRAFTS, f"{DRAFTS} must be true or false, got {value!r}")
    return value


def check_mode(value: Any, param: str = "exit_mode") -> str:
    """`value` as a K/V mode; DepthError unless one of `MODES`."""
    if not isinstance(value, str) or value not in MODES:
        raise DepthError(param, f"{param} must be one of {', '.join(MODES)}, got {value!r}")
    return value


assert {f.name for f in fields(ExitParams)} == {*DEPTH_FIELDS, FORCED, "guided"}
