"""Depth by intent: which source applies, what refines what, and what contradicts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ouro_runtime.config import DepthError, ExitParams
from ouro_server.depth import COMPLETIONS, RESPONSES, read_request
from ouro_server.presets import PresetBook
from ouro_server.resolve import Resolved
from tests.server.fakes import LOOPS, serve

BOOK = PresetBook.parse(
    {
        "presets": {
            "fast": {"exit_threshold": 0.3},
            "slow": {"exit_threshold": 0.9},
            "short": {"max_loops": 2},
            "deep": {"min_loops": 3, "exit_mode": "exact"},
        },
        "reasoning_effort": {"low": "fast", "high": "slow"},
        "priority_classes": {"paying": {"floor": 0.9}, "batch": {"floor": 0.1}},
        "default_priority_class": "batch",
    },
    LOOPS,
)
SERVED = serve(BOOK)
MIDDLE = {"exit_threshold": 0.5}
PRESET = {"depth_preset": "slow"}
EFFORT = {"reasoning_effort": "high"}
ALIAS = {"model": "m@fast"}


def read(*parts: dict[str, Any], served: Any = SERVED, endpoint: Any = COMPLETIONS) -> Resolved:
    body: dict[str, Any] = {"model": "m"}
    for part in parts:
        body |= part
    resolved = read_request(body, served, endpoint)
    assert resolved is not None
    return resolved


def refused(*parts: dict[str, Any], **options: Any) -> DepthError:
    with pytest.raises(DepthError) as error:
        read(*parts, **options)
    return error.value


@pytest.mark.parametrize(
    ("parts", "source", "preset", "threshold"),
    [
        ((), "default", None, 1.0),
        ((ALIAS,), "alias", "fast", 0.3),
        ((EFFORT,), "reasoning_effort", "slow", 0.9),
        ((PRESET,), "preset", "slow", 0.9),
        ((MIDDLE,), "request", None, 0.5),
        ((EFFORT, ALIAS), "reasoning_effort", "slow", 0.9),
        (({"depth_preset": "fast"}, EFFORT), "preset", "fast", 0.3),
        (({"depth_preset": "fast"}, ALIAS), "preset", "fast", 0.3),
        ((MIDDLE, ALIAS), "request", "fast", 0.5),
        ((MIDDLE, EFFORT), "request", "slow", 0.5),
        ((MIDDLE, EFFORT, ALIAS), "request", "slow", 0.5),
        (({"min_loops": 2}, PRESET, EFFORT), "request", "slow", 0.9),
        (({"depth_preset": "fast"}, EFFORT, ALIAS), "preset", "fast", 0.3),
        (({"vllm_xargs": MIDDLE}, ALIAS), "request", "fast", 0.5),
        (({"vllm_xargs": PRESET}, EFFORT), "preset", "slow", 0.9),
        (({"vllm_xargs": {"forced_depths": [2]}},), "request", None, 1.0),
    ],
)
def test_the_strongest_source_applies(
    parts: tuple, source: str, preset: str | None, threshold: float
) -> None:
    resolved = read(*parts)
    assert (resolved.source, resolved.preset) == (source, preset)
    assert resolved.params.exit_threshold == threshold


def test_fields_refine_the_preset_that_a_request_means() -> None:
    for intent in ({"depth_preset": "deep"}, {"model": "m@deep"}):
        assert read(intent, MIDDLE).params == ExitParams(0.5, 3, LOOPS, "exact")


def test_a_weaker_source_does_not_fill_what_a_preset_leaves_out() -> None:
    params = read({"depth_preset": "short"}, EFFORT).params
    assert params == ExitParams(1.0, 1, 2, "skip")


def test_what_a_preset_leaves_out_is_the_servers_default() -> None:
    served = serve(BOOK)
    served.defaults.change({"min_loops": 2, "exit_mode": "exact"})
    assert read({"depth_preset": "fast"}, served=served).params == ExitParams(0.3, 2, 4, "exact")


def test_a_presets_threshold_is_the_gates_whatever_rule_the_server_has() -> None:
    served = serve(BOOK)
    served.defaults.change({"exit_rule": "delta", "exit_threshold": 0.4})
    assert read(served=served).params == ExitParams(0.4, 1, 4, "skip", exit_rule="delta")
    assert read({"depth_preset": "fast"}, served=served).params.threshold_of("gate") == 0.3
    other = {"exit_rule": "margin", "exit_threshold": 0.3}
    with pytest.raises(DepthError, match="exit_rule is 'margin' but depth_preset 'fast'"):
        read({"depth_preset": "fast"}, other, served=served)
    assert read(ALIAS, other, served=served).params.threshold_of("margin") == 0.3


@pytest.mark.parametrize(
    ("parts", "param", "both"),
    [
        (({"depth_preset": "slow"}, ALIAS), "depth_preset", ("'slow'", "'fast'")),
        ((PRESET, MIDDLE), "exit_threshold", ("0.5", "'slow'", "0.9")),
        (({"depth_preset": "short", "max_loops": 3},), "max_loops", ("3", "'short'", "2")),
        (({"depth_preset": "short", "min_loops": 3},), "min_loops", ("3", "'short'", "max_loops")),
        (({"depth_preset": "deep", "max_loops": 2},), "max_loops", ("2", "'deep'", "min_loops")),
        (({"depth_preset": "deep", "exit_mode": "skip"},), "exit_mode", ("'skip'", "'exact'")),
        ((PRESET, {"vllm_xargs": MIDDLE}), "exit_threshold", ("0.5", "'slow'")),
        ((PRESET, {"vllm_xargs": {"depth_preset": "fast"}}), "depth_preset", ("'slow'", "'fast'")),
    ],
)
def test_a_contradiction_is_refused_with_both_sides(
    parts: tuple, param: str, both: tuple[str, ...]
) -> None:
    error = refused(*parts)
    assert error.param == param
    assert all(side in str(error) for side in both)


def test_saying_the_same_twice_is_no_contradiction() -> None:
    assert read(PRESET, {"exit_threshold": 0.9}).source == "request"
    assert read({"depth_preset": "short", "min_loops": 2}).params.min_loops == 2
    assert read({"depth_preset": "fast"}, ALIAS).source == "preset"


def test_limits_of_a_weaker_source_give_way_as_defaults_do() -> None:
    assert read({"model": "m@short"}, {"min_loops": 3}).params.max_loops == 3


def test_an_effort_without_a_preset_is_refused_and_the_others_named() -> None:
    error = refused({"reasoning_effort": "medium"})
    assert error.param == "reasoning_effort"
    assert "low, high" in str(error)


def test_efforts_that_no_file_maps_leave_depth_alone() -> None:
    bare = serve(PresetBook.parse({}, LOOPS))
    assert read(EFFORT, served=bare).source == "default"


def test_responses_take_the_effort_where_openai_puts_it() -> None:
    resolved = read({"reasoning": {"effort": "low"}}, endpoint=RESPONSES)
    assert (resolved.source, resolved.preset) == ("reasoning_effort", "fast")
    assert "reasoning.effort" in str(refused(EFFORT, endpoint=RESPONSES))
    assert read({"reasoning": None}, endpoint=RESPONSES).source == "default"


def test_the_request_model_refuses_an_effort_that_is_no_text() -> None:
    assert read({"reasoning_effort": 3}).source == "default"


def test_beam_search_takes_no_intent_either() -> None:
    for intent, param in (
        (PRESET, "depth_preset"),
        (EFFORT, "reasoning_effort"),
        (ALIAS, "model"),
        ({"priority_class": "paying"}, "priority_class"),
    ):
        assert refused({"use_beam_search": True}, intent).param == param


def test_a_name_that_is_served_is_no_alias() -> None:
    assert "m@fast" not in BOOK.aliases(["m", "m@fast"])
    assert BOOK.aliases(["m", "n"])["n@deep"] == "deep"


def test_a_request_has_its_priority_class_or_the_default_one() -> None:
    assert read().priority_class == "batch"
    assert read({"priority_class": "paying"}).priority_class == "paying"
    bare = serve(PresetBook.parse({}, LOOPS))
    assert read(served=bare).priority_class is None
    assert refused({"priority_class": "paying"}, served=bare).param == "priority_class"


def test_only_requests_that_set_no_depth_are_steered() -> None:
    served = serve(BOOK)
    served.defaults.steer({"batch": 0.2, "paying": 0.95})
    assert read(served=served).params.exit_threshold == 0.2
    assert read({"priority_class": "paying"}, served=served).params.exit_threshold == 0.95
    assert read({"min_loops": 2}, served=served).params.exit_threshold == 1.0
    assert read({"depth_preset": "deep"}, served=served).params.exit_threshold == 1.0


def test_the_alias_of_an_adapter_is_known_as_long_as_the_adapter_is() -> None:
    adapters: dict[str, object] = {}
    served = replace(serve(), adapters=adapters)
    assert served.alias("m@fast") == ("m@fast", "fast")
    assert served.alias("a@fast") is None
    adapters |= {"a": object(), "a@full": object()}
    assert served.alias("a@fast") == ("a", "fast")
    assert served.alias("a@full") is None, "an adapter may be called so"
    for other in ("a", "a@slow", "b@fast", "@fast", None, 3):
        assert served.alias(other) is None
