"""Whom the scheduler has drafted, and where."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams

from ouro_runtime.config import ExitParams, LoopConfig
from ouro_runtime.engine.cuda.draft_choice import KINDS, KNOWN, DraftChoice
from ouro_runtime.engine.cuda.draft_layout import DraftLayout
from ouro_runtime.engine.requests import LoopRequest
from ouro_runtime.engine.step_output import pack_notes
from ouro_runtime.loop.drafts import draft_rule

T = 4
CONFIG = LoopConfig(T, ExitParams(1.0, 1, T, "skip", guided=True))
EVERYWHERE = (1 << KINDS * (T - 1)) - 1


def request(**depth: Any) -> LoopRequest:
    fields = {"exit_mode": "lossless", **depth}
    return LoopRequest.of(SamplingParams(max_tokens=9, extra_args=fields), 3, CONFIG)


def notes(drafted: int, right: bool, cdf: tuple[float, ...], count: int = 1) -> np.ndarray:
    """Of `count` tokens that are alike."""
    made = np.full(count, drafted)
    depth = np.full(count, drafted if drafted and right else T)
    return pack_notes((depth, depth, made, made * 0), np.tile(cdf, (count, 1)))


@pytest.mark.parametrize(
    ("depth", "rule"),
    [
        ({}, (1.0, 1, 4)),
        ({"min_loops": 2}, (1.0, 1, 4)),
        ({"exit_threshold": 0.3}, (0.3, 1, 4)),
        ({"exit_threshold": 0.3, "min_loops": 2, "max_loops": 3}, (0.3, 2, 3)),
        ({"exit_threshold": 1.0}, None),
        ({"exit_threshold": 1.0, "max_loops": 2}, (1.0, 1, 2)),
        ({"exit_threshold": 0.3, "min_loops": 4}, None),
        ({"forced_depths": [2]}, (1.0, 2, 2)),
        ({"forced_depths": [2, 3]}, None),
        ({"forced_depths": [4]}, None),
        ({"exit_threshold": 0.3, "exit_mode": "skip"}, None),
    ],
)
def test_the_rule_of_a_requests_drafts(depth: dict[str, Any], rule: Any) -> None:
    assert draft_rule(request(**depth).params, False, T) == rule
    assert draft_rule(request(**depth).params, True, T) is None, "it needs the host between tokens"


def test_who_finds_room_is_drafted() -> None:
    own = request(exit_threshold=0.2)
    asked = {"a": own.params, "c": request().params, "d": own.params}
    assert DraftChoice(T, 64).choose(asked, 4) == {"a": 0, "c": EVERYWHERE, "d": 0}
    assert DraftChoice(T, 10).choose(asked, 4) == {"a": 0, "c": EVERYWHERE}
    assert DraftChoice(T, 6).choose(asked, 4) == DraftChoice(T, 0).choose(asked, 4) == {}


def test_a_request_says_between_which_loops_it_is_drafted() -> None:
    chosen = DraftChoice(T, 64).choose({"a": request(min_loops=2, max_loops=2).params}, 1)
    assert chosen == {"a": 0b111 << KINDS}


def test_only_what_a_request_passes_through_is_asked_for() -> None:
    choice, requests = DraftChoice(T, 64), {"a": request().params}
    choice.choose(requests, 1)
    choice.learn("a", notes(0, False, (0.05, 0.3, 0.8, 1.0), KNOWN))
    assert choice.choose(requests, 1) == {"a": 0b100_010_001}
    choice.learn("a", notes(0, False, (0.3, 0.3, 0.8, 1.0)))
    assert choice.choose(requests, 1) == {"a": 0b100_010_011}


def test_drafts_that_are_wrong_are_made_no_more_and_right_ones_go_on() -> None:
    choice, requests = DraftChoice(T, 64), {"a": request().params}
    choice.choose(requests, 1)
    cdf = (0.05, 0.3, 0.8, 1.0)
    choice.learn("a", notes(1, False, cdf, 40))
    choice.learn("a", notes(2, True, cdf, 40))
    assert choice.choose(requests, 1) == {"a": 0b100_010_000}
    for loop in (2, 3):
        choice.learn("a", notes(loop, False, cdf, 99))
    chosen = [choice.choose(requests, 1) for _ in range(12)]
    assert chosen == [{}] * 12, "a request that is drafted nowhere needs no lanes"
    again = [choice.choose(requests, 1) for _ in range(2000)]
    assert 3 <= sum(map(bool, again)) < 60, "now and then it is tried again"


def test_seats_are_given_up() -> None:
    choice = DraftChoice(T, 64)
    for name in "abc":
        choice.choose({name: request().params}, 1)
        choice.close(name)
    assert not choice._seats and choice._free == [0]
    choice.close("never seen")


def test_lanes_of_a_step() -> None:
    """Three requests, of which the last and the first are drafted."""
    drafted, again = np.array([True, False, True]), np.array([False, False, True])
    layout = DraftLayout.of(drafted, again, np.array([5, -1, 0]), 3)
    assert layout.row.tolist() == [0, 1, 2, 0, 0, 2, 2]
    assert layout.place.tolist() == [0, 0, 0, 1, 2, 1, 2]
    assert layout.before.tolist() == [4, 1, 6, 0, 3, 2, 5]
    assert layout.on.tolist() == [True, False, True, True, True, True, True]
    packed = layout.pack(9)
    assert packed[1].tolist() == [4, 1, 6, 0, 3, 2, 5, 7, 8], "a pad is nobody's successor"
    assert not packed[[0, 2, 3, 4, 5], 7:].any()
