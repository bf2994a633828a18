"""Depth controls are validated once, with errors that name the field and the range."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ouro_runtime.checkpoint_config import (
    FIELDS,
    MOST_LOOPS,
    ROPE_TYPES,
    ConfigError,
    OuroConfig,
    check_config,
)
from ouro_runtime.config import GATE, RULES, DepthError, ExitParams, LoopConfig

T = 4
DEFAULTS = ExitParams(1.0, 1, T, "skip")


def parse(**given) -> ExitParams:
    return ExitParams.parse(given, DEFAULTS, T)


def test_unset_fields_come_from_the_defaults() -> None:
    assert parse() == DEFAULTS
    assert parse(exit_threshold=None, max_loops=None) == DEFAULTS
    assert parse(exit_threshold=0).exit_threshold == 0.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("exit_threshold", v) for v in (-0.1, 1.5, True, "0.5", float("nan"), 10**400, [0.5])],
        *[(name, v) for name in ("min_loops", "max_loops") for v in (0, 5, 2.0, True, "2")],
        *[("exit_mode", v) for v in ("full", "", 1, ["skip"])],
        *[("exit_rule", v) for v in ("entropy", "", 1, ["gate"])],
        *[("forced_depths", v) for v in ([], 3, [0], [5], ["1"], "12")],
    ],
)
def test_a_bad_value_names_its_field(field: str, value: object) -> None:
    with pytest.raises(DepthError, match=field) as caught:
        parse(**{field: value})
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("rule", "most", "off"), [("gate", 1.0, 1.0), ("margin", 1.0, 1.0), ("delta", 2.0, 0.0)]
)
def test_a_threshold_is_in_the_unit_of_its_rule(rule: str, most: float, off: float) -> None:
    for value in (0, 0.5, most):
        params = parse(exit_rule=rule, exit_threshold=value)
        assert (params.exit_rule, params.exit_threshold) == (rule, value)
        assert {r: params.threshold_of(r) for r in RULES} == {
            r: value if r == rule else RULES[r][1] for r in RULES
        }
    for value in (-0.1, most + 0.1, float("nan"), True, "0.5"):
        with pytest.raises(DepthError, match=f"from 0 to {most:g}") as caught:
            parse(exit_rule=rule, exit_threshold=value)
        assert caught.value.param == "exit_threshold"
    config = LoopConfig.parse(SimpleNamespace(total_ut_steps=T))
    whole = {"exit_rule": rule, "exit_threshold": off}
    assert config.request(whole).exit_mode == "lossless", "every loop is asked for"
    assert config.request(whole | {"exit_threshold": most - off}).exit_mode == "skip"


def test_another_rule_than_the_default_brings_its_own_threshold() -> None:
    with pytest.raises(DepthError, match="exit_threshold must be set with exit_rule 'delta'") as no:
        parse(exit_rule="delta")
    assert no.value.param == "exit_threshold"
    assert parse(exit_rule="gate") == DEFAULTS
    served = LoopConfig.parse(
        SimpleNamespace(total_ut_steps=T), {"exit_rule": "delta", "exit_threshold": 1.5}
    )
    assert served.request({"exit_rule": "delta"}).threshold_of("delta") == 1.5
    assert served.request({"exit_threshold": 0.3}).threshold_of("delta") == 0.3
    with pytest.raises(DepthError, match="the default one is of 'delta'"):
        served.request({"exit_rule": "gate"})


def test_the_rule_of_a_lossless_request_that_gives_no_threshold_is_left_to_the_engine() -> None:
    steered = ExitParams(0.9, 1, T, "auto", exit_rule="margin", guided=True)
    engine = LoopConfig.parse(SimpleNamespace(total_ut_steps=T))
    asked = ExitParams.parse({"exit_mode": "lossless"}, steered, T).settled(T)
    assert engine.request(asked.controls()).guided
    own = {"exit_mode": "lossless", "exit_rule": "margin", "exit_threshold": 0.4}
    asked = ExitParams.parse(own, steered, T).settled(T)
    assert engine.request(asked.controls()) == asked and not asked.guided


def test_one_loop_limit_moves_the_default_of_the_other() -> None:
    narrow = ExitParams(1.0, 2, 3, "skip")
    assert ExitParams.parse({"max_loops": 1}, narrow, T).min_loops == 1
    assert ExitParams.parse({"min_loops": 4}, narrow, T).max_loops == 4
    with pytest.raises(DepthError, match=r"min_loops \(3\) must not exceed max_loops \(2\)"):
        parse(min_loops=3, max_loops=2)


def test_forced_depths_turn_the_gate_off() -> None:
    params = parse(forced_depths=[3, 1], exit_threshold=0.2)
    assert params.forced_depths == (3, 1) and params.threshold_of(GATE) == 1.0
    assert parse(exit_threshold=0.2).threshold_of(GATE) == 0.2


@pytest.mark.parametrize("steps", [0, -1, None, "4", 2.0, True, MOST_LOOPS + 1])
def test_a_checkpoint_without_loops_is_refused(steps: object) -> None:
    with pytest.raises(ConfigError, match="total_ut_steps must be an integer from 1 to 63"):
        LoopConfig.parse(SimpleNamespace(total_ut_steps=steps))


HUGE, NAN = 10**400, float("nan")
WRONG: dict[str, tuple[Any, ...]] = {
    "total_ut_steps": (0, 64, 5000, "4", 2.0, True, None),
    "early_exit_threshold": ("x", -0.1, NAN, True, [1], HUGE),
    "max_position_embeddings": ("a", 0, 2.5, None, True, 2**31),
    "hidden_act": ("nope", "gelu", 3, None),
    "rms_norm_eps": ("x", 0, -1e-6, NAN, None, True),
    "rope_theta": ("x", 0, None, float("inf"), HUGE),
    "rope_scaling": (
        [1],
        "linear",
        {"type": "x"},
        {"rope_type": ["linear"]},
        {"type": "linear"},
        {"type": "linear", "factor": "x"},
        {"type": "dynamic", "factor": None},
        {"type": "default", "rope_theta": "x"},
        {"full_attention": {"rope_type": "default"}},
    ),
    "rope_parameters": ({"rope_type": "yarn"},),
    "torch_dtype": ("float99", 3, "torch.float32", ["float32"]),
    "dtype": ("int8", 3),
    "use_sliding_window": (True, 1),
    "layer_types": ("x", ["full_attention", "sliding_attention"], [1]),
    "tie_word_embeddings": ("x", 1, None),
    "quantization_config": ("x", ["fp8"]),
    "bos_token_id": ("x", [1]),
    "pad_token_id": (0.5,),
    "eos_token_id": ("x", [[1]], {}),
}
RIGHT: dict[str, tuple[Any, ...]] = {
    "total_ut_steps": (1, MOST_LOOPS),
    "early_exit_threshold": (0, 0.5, 1.0, 2, None),
    "max_position_embeddings": (1, 65536),
    "rope_theta": (10_000, 1e6),
    "rope_scaling": (
        None,
        {"type": "linear", "factor": 2},
        {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
        {"rope_type": "yarn", "factor": 4.0, "truncate": False, "mscale": None},
        {"rope_theta": 1e6, "rope_type": "default"},
    ),
    "torch_dtype": ("bfloat16", "float32", None),
    "layer_types": (None, ["full_attention"] * 2),
    "eos_token_id": (0, [1, 2], None),
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in WRONG.items() for v in vs])
def test_a_wrong_field_of_config_json_is_named_with_what_is_allowed(
    name: str, value: object
) -> None:
    with pytest.raises(ConfigError) as refusal:
        check_config({name: value}, "c.json")
    said = str(refusal.value)
    assert said.startswith(f"c.json: {name} must be {FIELDS[name].allowed}, got ")
    assert "\n" not in said
    assert len(said) < 400


def test_every_field_has_a_wrong_value_here() -> None:
    assert WRONG.keys() == FIELDS.keys()


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in RIGHT.items() for v in vs])
def test_a_right_field_of_config_json_passes(name: str, value: object) -> None:
    check_config({name: value})


def test_a_wrong_config_json_is_refused_wherever_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "ouro", "hidden_act": "nope"}))
    with pytest.raises(ConfigError, match="hidden_act must be 'silu', got 'nope'"):
        OuroConfig.from_pretrained(tmp_path)


def test_what_a_config_says_of_itself_passes() -> None:
    check_config(OuroConfig().to_dict())
    for kind in ROPE_TYPES:
        assert hasattr(OuroConfig, f"_validate_{kind}_rope_parameters")


def test_server_settings_override_the_checkpoint() -> None:
    config = SimpleNamespace(total_ut_steps=T, early_exit_threshold=0.7)
    assert LoopConfig.parse(config).defaults == ExitParams(0.7, 1, T, "auto")
    served = LoopConfig.parse(config, {"exit_threshold": 0.2, "exit_mode": "exact"})
    assert served.defaults == ExitParams(0.2, 1, T, "exact")
    with pytest.raises(DepthError, match="unknown setting 'threshold'"):
        LoopConfig.parse(config, {"threshold": 0.2})
    assert LoopConfig.parse(SimpleNamespace(total_ut_steps=T, early_exit_threshold=2)).defaults == (
        ExitParams(1.0, 1, T, "auto")
    )


def test_a_threshold_that_was_given_says_where_to_draft() -> None:
    config = LoopConfig.parse(SimpleNamespace(total_ut_steps=T), {"exit_threshold": 0.4})
    assert config.request({"exit_mode": "lossless"}).guided
    own = config.request({"exit_mode": "lossless", "exit_threshold": 0.2})
    assert (own.exit_threshold, own.guided) == (0.2, False)
    forced = config.request({"exit_mode": "lossless", "forced_depths": [1]})
    assert not forced.guided and forced.threshold_of(GATE) == 1
    again = config.request(own.controls()), config.request({"exit_mode": "lossless"}).controls()
    assert again[0] == own and "exit_threshold" not in again[1]


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        ({}, "lossless"),
        ({"exit_threshold": 1.0}, "lossless"),
        ({"min_loops": 2}, "lossless"),
        ({"exit_threshold": 0.5}, "skip"),
        ({"max_loops": 2}, "skip"),
        ({"forced_depths": [4]}, "skip"),
        ({"exit_mode": "exact"}, "exact"),
    ],
)
def test_auto_is_lossless_where_every_loop_is_asked_for(given: dict[str, Any], mode: str) -> None:
    config = LoopConfig.parse(SimpleNamespace(total_ut_steps=T), {"exit_mode": "auto"})
    assert config.request(given).exit_mode == mode


def test_without_drafts_a_lossless_request_runs_every_loop() -> None:
    config = LoopConfig.parse(SimpleNamespace(total_ut_steps=T), {"drafts": False})
    asked = {"exit_mode": "lossless", "exit_threshold": 0.1, "max_loops": 2, "forced_depths": [1]}
    assert config.request(asked) == ExitParams(1.0, 1, T, "lossless")
    with pytest.raises(DepthError, match="drafts must be true or false, got 1"):
        LoopConfig.parse(SimpleNamespace(total_ut_steps=T), {"drafts": 1})


@pytest.mark.parametrize("mode", ["skip", "exact", "lossless", "auto"])
def test_controls_give_the_same_again(mode: str) -> None:
    """Also those of a request that gave no threshold, on a server whose default has moved."""
    config = LoopConfig.parse(SimpleNamespace(total_ut_steps=T), {"exit_threshold": 0.4})
    for defaults in (config.defaults, replace(config.defaults, exit_threshold=0.7)):
        for given in ({}, {"exit_threshold": 0.2}, {"min_loops": 2}, {"exit_threshold": 1.0}):
            asked = ExitParams.parse({**given, "exit_mode": mode}, defaults, T).settled(T)
            again = config.request(asked.controls())
            assert (again.exit_mode, again.min_loops) == (asked.exit_mode, asked.min_loops)
            if asked.exit_mode == "lossless":
                assert again.guided == asked.guided
            if asked.exit_mode != "lossless" or not asked.guided:
                assert again.exit_threshold == asked.exit_threshold
