"""What a checkpoint says: `OuroConfig` reads a released `config.json`.

`FIELDS` is what may stand in it: it is checked once, here, and trusted everywhere else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from transformers import PretrainedConfig

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


def is_number(value: Any) -> bool:
    """A finite one, that is also a float; true and false are none."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


def is_integer(value: Any) -> bool:
    """An int; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def _integer(low: int, high: int) -> Rule:
    return Rule(f"an integer from {low} to {high}", lambda v: is_integer(v) and low <= v <= high)


def or_null(rule: Rule) -> Rule:
    """What `rule` allows, or null."""
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
        and all(is_number(v) or isinstance(v, bool) for values in lists for v in values)
        and (kind in ("default", "longrope") or is_number(value.get("factor")))
    )


_POSITIVE = Rule("a number above 0", lambda v: is_number(v) and v > 0)
_DTYPE = or_null(Rule(f"one of {', '.join(DTYPES)}", lambda v: v in DTYPES))
_ROPE = or_null(
    Rule(
        f"an object whose rope_type is one of {', '.join(ROPE_TYPES)}, with a number as factor "
        "where the type needs one, and numbers in its other fields",
        _is_rope,
    )
)
_TOKEN = or_null(Rule("a token id", is_integer))

FIELDS: Mapping[str, Rule] = {
    "total_ut_steps": _integer(1, MOST_LOOPS),
    "early_exit_threshold": or_null(
        Rule("a number of 0 or more", lambda v: is_number(v) and v >= 0)
    ),
    "max_position_embeddings": _integer(1, 2**31 - 1),
    "hidden_act": Rule("'silu'", lambda v: v == "silu"),
    "rms_norm_eps": _POSITIVE,
    "rope_theta": _POSITIVE,
    "rope_scaling": _ROPE,
    "rope_parameters": _ROPE,
    "torch_dtype": _DTYPE,
    "dtype": _DTYPE,
    "use_sliding_window": or_null(Rule("false", lambda v: v is False)),
    "layer_types": or_null(
        Rule(
            "a list of 'full_attention'",
            lambda v: isinstance(v, list) and all(kind == "full_attention" for kind in v),
        )
    ),
    "tie_word_embeddings": Rule("true or false", lambda v: isinstance(v, bool)),
    "quantization_config": or_null(Rule("an object", lambda v: isinstance(v, Mapping))),
    "bos_token_id": _TOKEN,
    "pad_token_id": _TOKEN,
    "eos_token_id": or_null(
        Rule(
            "a token id or a list of them",
            lambda v: all(map(is_integer, v if isinstance(v, list) else [v])),
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
