"""Depth controls of a request body: what is accepted, what is refused, and where they end up."""

from __future__ import annotations

import pytest

from ouro_runtime.config import DepthError
from ouro_server.depth import check_request, find_controls
from ouro_server.schemas import (
    DepthChatRequest,
    DepthCompletionRequest,
    DepthResponsesRequest,
)
from tests.server.fakes import CONFIG

BAD = [
    ("exit_threshold", True),
    ("exit_threshold", "0.5"),
    ("exit_threshold", float("nan")),
    ("exit_threshold", float("inf")),
    ("exit_threshold", -0.1),
    ("exit_threshold", 1.5),
    ("exit_threshold", 10**400),
    ("exit_threshold", [0.5]),
    ("exit_threshold", {}),
    ("min_loops", True),
    ("min_loops", "2"),
    ("min_loops", 2.0),
    ("min_loops", 0),
    ("min_loops", 5),
    ("min_loops", float("nan")),
    ("max_loops", False),
    ("max_loops", 0),
    ("max_loops", 10**400),
    ("max_loops", [1]),
    ("exit_mode", "full"),
    ("exit_mode", "SKIP"),
    ("exit_mode", 1),
    ("exit_mode", True),
    ("exit_mode", ""),
    ("return_depths", 1),
    ("return_depths", "true"),
]
"""(field, value) pairs that every endpoint refuses, at the top level and inside `vllm_xargs`."""

GOOD = {
    "exit_threshold": 0.5,
    "min_loops": 1,
    "max_loops": 3,
    "exit_mode": "exact",
    "return_depths": True,
}

REQUESTS = [
    (DepthChatRequest, {"model": "m", "messages": [{"role": "user", "content": "hi"}]}, (8, {})),
    (DepthCompletionRequest, {"model": "m", "prompt": "hi"}, (8, {})),
    (DepthResponsesRequest, {"model": "m", "input": "hi"}, (8, {})),
]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("field", "value"), BAD)
def test_a_bad_value_is_refused_by_name(field: str, value: object, nested: bool) -> None:
    body = {"vllm_xargs": {field: value}} if nested else {field: value}
    with pytest.raises(DepthError) as refused:
        check_request(body, CONFIG)
    assert refused.value.param == field
    assert field in str(refused.value)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("field", "value"), GOOD.items())
def test_a_good_value_passes(field: str, value: object, nested: bool) -> None:
    check_request({"vllm_xargs": {field: value}} if nested else {field: value}, CONFIG)


@pytest.mark.parametrize("value", [0, 0.0, 1, 1.0])
def test_the_ends_of_the_threshold_are_included(value: float) -> None:
    check_request({"exit_threshold": value}, CONFIG)


def test_null_is_unset() -> None:
    check_request(dict.fromkeys(GOOD), CONFIG)
    check_request({"vllm_xargs": dict.fromkeys(GOOD)}, CONFIG)


def test_min_above_max_is_refused_wherever_the_two_stand() -> None:
    for body in (
        {"min_loops": 3, "max_loops": 2},
        {"min_loops": 3, "vllm_xargs": {"max_loops": 2}},
        {"vllm_xargs": {"min_loops": 3, "max_loops": 2}},
    ):
        with pytest.raises(DepthError, match=r"min_loops .* max_loops"):
            check_request(body, CONFIG)


def test_a_field_set_twice_is_refused_unless_both_agree() -> None:
    check_request({"exit_threshold": 0.5, "vllm_xargs": {"exit_threshold": 0.5}}, CONFIG)
    with pytest.raises(DepthError, match=r"min_loops is 2 but vllm_xargs\.min_loops is 3"):
        check_request({"min_loops": 2, "vllm_xargs": {"min_loops": 3}}, CONFIG)
    with pytest.raises(DepthError):
        check_request({"min_loops": 1, "vllm_xargs": {"min_loops": True}}, CONFIG)


def test_forced_depths_are_for_xargs_only_and_checked() -> None:
    check_request({"vllm_xargs": {"forced_depths": [1, 4]}}, CONFIG)
    for body in (
        {"forced_depths": [1]},
        {"vllm_xargs": {"forced_depths": []}},
        {"vllm_xargs": {"forced_depths": [True]}},
        {"vllm_xargs": {"forced_depths": [5]}},
        {"vllm_xargs": {"forced_depths": "1"}},
    ):
        with pytest.raises(DepthError) as refused:
            check_request(body, CONFIG)
        assert refused.value.param == "forced_depths"


def test_beam_search_takes_no_depth() -> None:
    check_request({"use_beam_search": True, "return_depths": False}, CONFIG)
    for field, value in GOOD.items():
        with pytest.raises(DepthError, match=f"{field} .*beam"):
            check_request({"use_beam_search": True, field: value}, CONFIG)


def test_a_model_without_loops_takes_no_depth() -> None:
    check_request({"temperature": 1}, None)
    with pytest.raises(DepthError, match="no loops"):
        check_request({"exit_threshold": 0.5}, None)


def test_a_message_is_short_whatever_was_sent() -> None:
    with pytest.raises(DepthError) as refused:
        check_request({"exit_mode": "x" * 10**6}, CONFIG)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("body", [None, [], "text", {"vllm_xargs": 3}, {"vllm_xargs": [1]}])
def test_other_shapes_are_left_to_the_request_model(body: object) -> None:
    check_request(body, CONFIG)


def test_controls_are_found_in_both_places() -> None:
    body = {"exit_threshold": 0.5, "vllm_xargs": {"max_loops": 2, "other": 1}}
    assert find_controls(body) == {"exit_threshold": 0.5, "max_loops": 2}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("model", "body", "arguments"), REQUESTS)
def test_controls_reach_the_engine(model: type, body: dict, arguments: tuple, nested: bool) -> None:
    controls = {k: v for k, v in GOOD.items() if k != "return_depths"}
    if nested:
        extra = {"vllm_xargs": {**controls, "other": 7, "forced_depths": [1, 2]}}
        expected = {**controls, "other": 7, "forced_depths": [1, 2]}
    else:
        extra, expected = controls, controls
    params = model.model_validate({**body, **extra}).to_sampling_params(*arguments)
    assert params.extra_args == expected
    assert all(type(params.extra_args[k]) is type(v) for k, v in expected.items())


@pytest.mark.parametrize(("model", "body", "arguments"), REQUESTS)
def test_a_request_without_controls_is_vllms_own(model: type, body: dict, arguments: tuple) -> None:
    assert not model.model_validate(body).to_sampling_params(*arguments).extra_args


@pytest.mark.parametrize("model", [DepthChatRequest, DepthCompletionRequest, DepthResponsesRequest])
def test_openapi_describes_every_field(model: type) -> None:
    properties = model.model_json_schema()["properties"]
    fields = ["exit_threshold", "min_loops", "max_loops", "exit_mode"]
    fields += [] if model is DepthResponsesRequest else ["return_depths"]
    assert all(properties[field]["description"] for field in fields)
