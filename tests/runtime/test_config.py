"""Depth controls are validated once, with errors that name the field and the range."""

from types import SimpleNamespace

import pytest

from ouro_runtime.config import DepthError, ExitParams, LoopConfig

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
        *[("forced_depths", v) for v in ([], 3, [0], [5], ["1"], "12")],
    ],
)
def test_a_bad_value_names_its_field(field: str, value: object) -> None:
    with pytest.raises(DepthError, match=field) as caught:
        parse(**{field: value})
    assert caught.value.param == field


def test_one_loop_limit_moves_the_default_of_the_other() -> None:
    narrow = ExitParams(1.0, 2, 3, "skip")
    assert ExitParams.parse({"max_loops": 1}, narrow, T).min_loops == 1
    assert ExitParams.parse({"min_loops": 4}, narrow, T).max_loops == 4
    with pytest.raises(DepthError, match=r"min_loops \(3\) must not exceed max_loops \(2\)"):
        parse(min_loops=3, max_loops=2)


def test_forced_depths_turn_the_gate_off() -> None:
    params = parse(forced_depths=[3, 1], exit_threshold=0.2)
    assert params.forced_depths == (3, 1) and params.gate_threshold == 1.0
    assert parse(exit_threshold=0.2).gate_threshold == 0.2


@pytest.mark.parametrize("steps", [0, -1, None, "4", 2.0, True])
def test_a_checkpoint_without_loops_is_refused(steps: object) -> None:
    with pytest.raises(DepthError, match="total_ut_steps"):
        LoopConfig.parse(SimpleNamespace(total_ut_steps=steps))


def test_server_settings_override_the_checkpoint() -> None:
    config = SimpleNamespace(total_ut_steps=T, early_exit_threshold=0.7)
    assert LoopConfig.parse(config).defaults == ExitParams(0.7, 1, T, "skip")
    served = LoopConfig.parse(config, {"exit_threshold": 0.2, "exit_mode": "exact"})
    assert served.defaults == ExitParams(0.2, 1, T, "exact")
    with pytest.raises(DepthError, match="unknown setting 'threshold'"):
        LoopConfig.parse(config, {"threshold": 0.2})
    assert LoopConfig.parse(SimpleNamespace(total_ut_steps=T, early_exit_threshold=2)).defaults == (
        DEFAULTS
    )
