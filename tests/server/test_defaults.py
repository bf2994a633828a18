"""The defaults in force: changed by the operator, steered by the controller."""

from __future__ import annotations

import math

import pytest

from ouro_runtime.config import DepthError, ExitParams
from ouro_server.defaults import Defaults

START = ExitParams(0.8, 1, 4, "skip")


@pytest.fixture
def defaults() -> Defaults:
    return Defaults(START, 4)


def test_a_change_sets_what_it_names_and_leaves_the_rest(defaults: Defaults) -> None:
    defaults.change({"exit_threshold": 0.5, "exit_mode": None})
    assert defaults.base == ExitParams(0.5, 1, 4, "skip")
    defaults.change({})
    assert defaults.base == ExitParams(0.5, 1, 4, "skip")
    defaults.change({"max_loops": 2})
    defaults.change({"min_loops": 3})
    assert defaults.base == ExitParams(0.5, 3, 3, "skip")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"min_loops": 2, "exit_threshold": 2}, "exit_threshold"),
        ({"exit_threshold": 0.1, "max_loops": 5}, "max_loops"),
        ({"exit_threshold": 0.1, "min_loops": 3, "max_loops": 2}, "min_loops"),
        ({"exit_threshold": 0.1, "exit_mode": "full"}, "exit_mode"),
        ({"exit_threshold": 0.1, "threshold": 0.2}, "threshold"),
        ({"exit_threshold": 0.1, "forced_depths": [1]}, "forced_depths"),
        ({"exit_threshold": 0.1, "depth_preset": "fast"}, "depth_preset"),
        ({"exit_threshold": True}, "exit_threshold"),
    ],
)
def test_a_wrong_change_changes_nothing(defaults: Defaults, fields: dict, param: str) -> None:
    with pytest.raises(DepthError) as refused:
        defaults.change(fields)
    assert refused.value.param == param
    assert defaults.base == START


def test_steering_moves_the_classes_it_names(defaults: Defaults) -> None:
    defaults.steer({"batch": 0.1})
    assert defaults.for_class("batch") == ExitParams(0.1, 1, 4, "skip")
    assert defaults.for_class("paying") == defaults.for_class(None) == defaults.base == START
    defaults.steer({"paying": 0.7})
    assert defaults.for_class("batch") == START
    defaults.steer({})
    assert defaults.for_class("paying") == START


def test_a_change_reaches_a_steered_class_too(defaults: Defaults) -> None:
    defaults.steer({"batch": 0.1})
    defaults.change({"exit_mode": "exact", "exit_threshold": 0.9})
    assert defaults.for_class("batch") == ExitParams(0.1, 1, 4, "exact")
    assert defaults.for_class("paying") == ExitParams(0.9, 1, 4, "exact")


@pytest.mark.parametrize("wrong", [-0.1, 1.1, math.nan])
def test_a_wrong_threshold_steers_nothing(defaults: Defaults, wrong: float) -> None:
    defaults.steer({"batch": 0.2})
    with pytest.raises(DepthError, match="threshold of paying"):
        defaults.steer({"batch": 0.1, "paying": wrong})
    assert defaults.for_class("batch").exit_threshold == 0.2
