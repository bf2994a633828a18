"""Depth controls of a request body: what is accepted, what is refused, and where they end up."""

from __future__ import annotations

import pytest

from ouro_runtime.config import DepthError
from ouro_server.depth import find_controls, read_request
from ouro_server.schemas import (
    DepthChatRequest,
    DepthCompletionRequest,
    DepthResponsesRequest,
)
from tests.server.fakes import serve

SERVED = serve()

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
    ("exit_rule", "entropy"),
    ("exit_rule", 1),
    ("return_depths", 1),
    ("return_depths", "true"),
    ("return_exit_cdf", 1),
    ("return_exit_cdf", "true"),
    *(("return_loops", value) for value in (0, 21, True, 2.0, "3", [1])),
    ("depth_preset", "slow"),
    ("depth_preset", 1),
    ("depth_preset", ["fast"]),
    ("depth_preset", ""),
    ("priority_class", "vip"),
    ("priority_class", {}),
    ("priority_class", False),
]
"""(field, value) pairs that every endpoint refuses, at the top level and inside `vllm_xargs`."""

GOOD = {
    "exit_threshold": 0.5,
    "min_loops": 1,
    "max_loops": 3,
    "exit_mode": "exact",
    "return_depths": True,
    "return_exit_cdf": True,
    "return_loops": 3,
    "depth_preset": "fast",
    "priority_class": "batch",
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
        read_request(body, SERVED)
    assert refused.value.param == field
    assert field in str(refused.value)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("field", "value"), GOOD.items())
def test_a_good_value_passes(field: str, value: object, nested: bool) -> None:
    read_request({"vllm_xargs": {field: value}} if nested else {field: value}, SERVED)


@pytest.mark.parametrize("value", [0, 0.0, 1, 1.0])
def test_the_ends_of_the_threshold_are_included(value: float) -> None:
    read_request({"exit_threshold": value}, SERVED)


def test_null_is_unset() -> None:
    read_request(dict.fromkeys(GOOD), SERVED)
    read_request({"vllm_xargs": dict.fromkeys(GOOD)}, SERVED)


def test_min_above_max_is_refused_wherever_the_two_stand() -> None:
    for body in (
        {"min_loops": 3, "max_loops": 2},
        {"min_loops": 3, "vllm_xargs": {"max_loops": 2}},
        {"vllm_xargs": {"min_loops": 3, "max_loops": 2}},
    ):
        with pytest.raises(DepthError, match=r"min_loops .* max_loops"):
            read_request(body, SERVED)


def test_a_field_set_twice_is_refused_unless_both_agree() -> None:
    read_request({"exit_threshold": 0.5, "vllm_xargs": {"exit_threshold": 0.5}}, SERVED)
    with pytest.raises(DepthError, match=r"min_loops is 2 but vllm_xargs\.min_loops is 3"):
        read_request({"min_loops": 2, "vllm_xargs": {"min_loops": 3}}, SERVED)
    with pytest.raises(DepthError):
        read_request({"min_loops": 1, "vllm_xargs": {"min_loops": True}}, SERVED)


def test_forced_depths_are_for_xargs_only_and_checked() -> None:
    read_request({"vllm_xargs": {"forced_depths": [1, 4]}}, SERVED)
    for body in (
        {"forced_depths": [1]},
        {"vllm_xargs": {"forced_depths": []}},
        {"vllm_xargs": {"forced_depths": [True]}},
        {"vllm_xargs": {"forced_depths": [5]}},
        {"vllm_xargs": {"forced_depths": "1"}},
    ):
        with pytest.raises(DepthError) as refused:
            read_request(body, SERVED)
        assert refused.value.param == "forced_depths"


def test_beam_search_takes_no_depth() -> None:
    read_request({"use_beam_search": True, "return_depths": False}, SERVED)
    for field, value in GOOD.items():
        with pytest.raises(DepthError, match=f"{field} .*beam"):
            read_request({"use_beam_search": True, field: value}, SERVED)


def test_a_model_without_loops_takes_no_depth() -> None:
    read_request({"temperature": 1}, None)
    with pytest.raises(DepthError, match="no loops"):
        read_request({"exit_threshold": 0.5}, None)


def test_a_message_is_short_whatever_was_sent() -> None:
    with pytest.raises(DepthError) as refused:
        read_request({"exit_mode": "x" * 10**6}, SERVED)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("body", [None, [], "text", {"vllm_xargs": 3}, {"vllm_xargs": [1]}])
def test_other_shapes_are_left_to_the_request_model(body: object) -> None:
    read_request(body, SERVED)


def test_controls_are_found_in_both_places() -> None:
    body = {"exit_threshold": 0.5, "vllm_xargs": {"max_loops": 2, "other": 1}}
    assert find_controls(body) == {"exit_threshold": 0.5, "max_loops": 2}


CONTROLS = {
    "exit_threshold": 1.5,
    "min_loops": 1,
    "max_loops": 3,
    "exit_mode": "exact",
    "exit_rule": "delta",
}


def extra_args(model: type, body: dict, arguments: tuple) -> dict:
    """What the engine is handed for a body that came to `model`'s endpoint."""
    request = model.model_validate(body)
    request.resolve(read_request(body, SERVED))
    return request.to_sampling_params(*arguments).extra_args


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("model", "body", "arguments"), REQUESTS)
def test_controls_reach_the_engine(model: type, body: dict, arguments: tuple, nested: bool) -> None:
    if nested:
        more = {"kv_cache_report_mode": "full", "forced_depths": [1, 2]}
        xargs = {**CONTROLS, **more, "session_id": "a"}
        given = extra_args(model, {**body, "vllm_xargs": xargs}, arguments)
        assert model.model_validate({**body, "vllm_xargs": xargs}).session_id == "a"
        expected = {**CONTROLS, **more}
    else:
        given, expected = extra_args(model, {**body, **CONTROLS}, arguments), CONTROLS
    assert given == expected
    assert all(type(given[k]) is type(v) for k, v in expected.items())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("model", "body", "arguments"), REQUESTS[:2])
def test_the_wish_to_hear_every_loop_reaches_the_engine(
    model: type, body: dict, arguments: tuple, nested: bool
) -> None:
    asked: dict = {"return_loops": 3}
    asked = {"vllm_xargs": asked} if nested else asked
    assert extra_args(model, body | asked, arguments)["return_loops"] == 3
    assert "return_loops" not in extra_args(model, body, arguments)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("model", "body", "arguments"), REQUESTS)
def test_a_preset_reaches_the_engine(
    model: type, body: dict, arguments: tuple, nested: bool
) -> None:
    fields = {"depth_preset": "fast", "min_loops": 2}
    more = {"vllm_xargs": fields} if nested else fields
    assert extra_args(model, {**body, **more}, arguments) == {
        "exit_threshold": 0.3,
        "min_loops": 2,
        "max_loops": 4,
        "exit_mode": "skip",
        "exit_rule": "gate",
    }


@pytest.mark.parametrize(("model", "body", "arguments"), REQUESTS)
def test_a_request_without_controls_is_handed_the_defaults(
    model: type, body: dict, arguments: tuple
) -> None:
    assert extra_args(model, body, arguments) == {
        "exit_threshold": 1.0,
        "min_loops": 1,
        "max_loops": 4,
        "exit_mode": "skip",
        "exit_rule": "gate",
    }


@pytest.mark.parametrize(("model", "body", "arguments"), REQUESTS)
def test_a_model_without_loops_is_handed_nothing(model: type, body: dict, arguments: tuple) -> None:
    request = model.model_validate(body)
    request.resolve(read_request(body, None))
    assert not request.to_sampling_params(*arguments).extra_args


@pytest.mark.parametrize("model", [DepthChatRequest, DepthCompletionRequest, DepthResponsesRequest])
def test_openapi_describes_every_field(model: type) -> None:
    properties = model.model_json_schema()["properties"]
    fields = [*CONTROLS, "depth_preset", "priority_class"]
    fields += (
        []
        if model is DepthResponsesRequest
        else ["return_depths", "return_exit_cdf", "return_loops"]
    )
    assert all(properties[field]["description"] for field in fields)
