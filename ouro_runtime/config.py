"""What a checkpoint, a server and a request say about loops.

`OuroConfig` reads a released `config.json`; `FIELDS` is what may stand in it. `LoopConfig` holds
the server's defaults. `ExitParams` are one request's depth controls. Each is validated once, here,
and trusted everywhere else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

from transformers import PretrainedConfig

AUTO, SHARED, LOSSLESS = "auto", "shared", "lossless"
MODES = (AUTO, "skip", "exact", SHARED, LOSSLESS)
"""Exit modes a request may choose. `auto` is `lossless` where every loop is asked for, else
`skip`; `shared` is `skip` with one K/V for all loops."""

DEPTH_FIELDS = ("exit_threshold", "min_loops", "max_loops", "exit_mode")
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


MOST_LOOPS = 63
"""T at most: `loop/lanes.py` keeps the loops a lane may have behind it as bits of an int64, and
`cache/standin.py` a depth as a uint8."""

DTYPES = ("bfloat16", "float16", "float32", "float64")
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
"""Those that transformers can check and vLLM can compute."""

SHOWN = 80
"""Characters of a wrong value that a message repeats."""


class ConfigError(ValueError):
    """A field of `config.json` that cannot be served; the message names it and what is allowed."""


class Rule(NamedTuple):
    """What a field may hold: in words, and as a test."""

    allowed: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    """A finite one, that is also a float; true and false are none."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integer(low: int, high: int) -> Rule:
    return Rule(f"an integer from {low} to {high}", lambda v: _is_integer(v) and low <= v <= high)


def _or_null(rule: Rule) -> Rule:
    return Rule(f"{rule.allowed}, or null", lambda v: v is None or rule.holds(v))


def _is_rope(value: Any) -> bool:
    """Whether `value` is a rope_scaling: its type, and numbers, a factor among them for most."""
    if not isinstance(value, Mapping):
        return False
    kind = value.get("rope_type", value.get("type", "default"))
    numbers = {k: v for k, v in value.items() if k not in ("rope_type", "type")}
    lists = [v if isinstance(v, list) else [v] for v in numbers.values() if v is not None]
    return (
        kind in ROPE_TYPES
        and all(_is_number(v) or isinstance(v, bool) for values in lists for v in values)
        and (kind in ("default", "longrope") or _is_number(value.get("factor")))
    )


_POSITIVE = Rule("a number above 0", lambda v: _is_number(v) and v > 0)
_DTYPE = _or_null(Rule(f"one of {', '.join(DTYPES)}", lambda v: v in DTYPES))
_ROPE = _or_null(
    Rule(
        f"an object whose rope_type is one of {', '.join(ROPE_TYPES)}, with a number as factor "
        "where the type needs one, and numbers in its other fields",
        _is_rope,
    )
)
_TOKEN = _or_null(Rule("a token id", _is_integer))

FIELDS: Mapping[str, Rule] = {
    "total_ut_steps": _integer(1, MOST_LOOPS),
    "early_exit_threshold": _or_null(
        Rule("a number of 0 or more", lambda v: _is_number(v) and v >= 0)
    ),
    "max_position_embeddings": _integer(1, 2**31 - 1),
    "hidden_act": Rule("'silu'", lambda v: v == "silu"),
    "rms_norm_eps": _POSITIVE,
    "rope_theta": _POSITIVE,
    "rope_scaling": _ROPE,
    "rope_parameters": _ROPE,
    "torch_dtype": _DTYPE,
    "dtype": _DTYPE,
    "use_sliding_window": _or_null(Rule("false", lambda v: v is False)),
    "layer_types": _or_null(
        Rule(
            "a list of 'full_attention'",
            lambda v: isinstance(v, list) and all(kind == "full_attention" for kind in v),
        )
    ),
    "tie_word_embeddings": Rule("true or false", lambda v: isinstance(v, bool)),
    "quantization_config": _or_null(Rule("an object", lambda v: isinstance(v, Mapping))),
    "bos_token_id": _TOKEN,
    "pad_token_id": _TOKEN,
    "eos_token_id": _or_null(
        Rule(
            "a token id or a list of them",
            lambda v: all(map(_is_integer, v if isinstance(v, list) else [v])),
        )
    ),
}
"""The fields of `config.json` that the model is computed by, or that would change what it computes
if it were another one. The sizes that tensors follow from are `model/checkpoint.py`'s."""


def check_config(config: Mapping[str, Any], source: str = "config.json") -> None:
    """Check the fields that `config` has.

    Args:
        source: where they stand, for the message.

    Raises:
        ConfigError: naming the first field that is wrong, and what is allowed.
    """
    for name, rule in FIELDS.items():
        if name in config and not rule.holds(config[name]):
            said = repr(config[name])
            said = said if len(said) <= SHOWN else f"{said[:SHOWN]}..."
            raise ConfigError(f"{source}: {name} must be {rule.allowed}, got {said}")


class OuroConfig(PretrainedConfig):
    """`config.json` of an Ouro checkpoint (`model_type: ouro`).

    Accepts the released files as they are: `rope_theta` and `torch_dtype` in their old places, no
    pad token, an `auto_map` that is ignored. Class defaults are those of the released code.
    """

    model_type = "ouro"

    def __init__(
        self,
        vocab_size: int = 151936,
        hidden_size: int = 4096,
        intermediate_size: int = 22016,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = 32,
        head_dim: int | None = None,
        hidden_act: str = "silu",
        max_position_embeddings: int = 32768,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        use_cache: bool = True,
        rope_theta: float = 10000.0,
        rope_scaling: dict[str, Any] | None = None,
        rope_parameters: dict[str, Any] | None = None,
        total_ut_steps: int = 4,
        early_exit_threshold: float = 1.0,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        scaling = rope_parameters or rope_scaling or {}
        self.rope_parameters = {
            "rope_type": scaling.get("rope_type", scaling.get("type", "default")),
            **{k: v for k, v in scaling.items() if k not in ("rope_type", "type")},
        }
        self.rope_parameters.setdefault("rope_theta", rope_theta)
        self.total_ut_steps = total_ut_steps
        self.early_exit_threshold = early_exit_threshold
        kwargs.pop("auto_map", None)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A `config.json` as it was read, from wherever; ConfigError for one that is wrong."""
        check_config(config_dict)
        return super().from_dict(config_dict, **kwargs)


@dataclass(frozen=True)
class ExitParams:
    """A request's depth controls, complete and valid for a model of `T` loops.

    Attributes:
        exit_threshold: q of the Q-exit rule, 0..1. At 1 the gate is off: `max_loops` loops run.
        min_loops, max_loops: bounds on the depth of every generated token, 1..T; in `lossless`, of
            every draft.
        exit_mode: `skip` (deeper loops are not run), `exact` (they run later, off the read-out),
            `lossless` (they run later, and the last one has the last word), or `auto`.
        forced_depths: if not empty, token i is read out at `forced_depths[i % len]`, whatever the
            gate says; in `lossless`, drafted there. For benchmarks and tests; values 1..T.
        guided: nobody gave a threshold for this request: in `lossless`, the server's rule says
            where to draft.
    """

    exit_threshold: float
    min_loops: int
    max_loops: int
    exit_mode: str
    forced_depths: tuple[int, ...] = ()
    guided: bool = field(default=False, compare=False)

    @property
    def gate_threshold(self) -> float:
        """What the gate's CDF is held against; 1, which turns it off, where depths are forced."""
        return 1.0 if self.forced_depths else self.exit_threshold

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
        if "exit_threshold" in picked:
            picked["exit_threshold"] = check_threshold(picked["exit_threshold"])
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
        if forced is not None or "exit_threshold" in picked:
            params = replace(params, guided=False)
        return params

    def settled(self, loops: int) -> ExitParams:
        """With the mode that `auto` stands for, of a model of `loops` loops."""
        if self.exit_mode != AUTO:
            return self
        if self.gate_threshold >= 1 and self.max_loops == loops and not self.forced_depths:
            return replace(self, exit_mode=LOSSLESS, guided=True)
        return replace(self, exit_mode="skip")

    def controls(self) -> dict[str, Any]:
        """The controls that `parse` makes these of again, but for forced depths."""
        unsaid = {"exit_threshold"} if self.guided and self.exit_mode == LOSSLESS else set()
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


def check_threshold(value: Any, param: str = "exit_threshold") -> float:
    """`value` as a threshold; DepthError unless a number from 0 to 1."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:  # NaN compares false
        raise DepthError(param, f"{param} must be a number from 0 to 1, got {value!r}")
    return float(value)


def check_loops(param: str, value: Any, loops: int) -> int:
    """`value` as a number of loops; DepthError unless an integer from 1 to `loops`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= loops:
        raise DepthError(param, f"{param} must be an integer from 1 to {loops}, got {value!r}")
    return value


def check_guesses(value: Any) -> int:
    """`value` as a request's `return_loops`; DepthError unless an integer from 1 to
    `MOST_GUESSES`."""
    if not _is_integer(value) or not 1 <= value <= MOST_GUESSES:
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
