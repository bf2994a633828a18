"""The control law against a simulated queue, and step by step."""

from __future__ import annotations

from statistics import quantiles

import pytest

from ouro_server.controller import Controller, Law, thresholds
from ouro_server.latency import LatencyWindow, Reading
from tests.server.simulated import Trace, simulate

LAW = Law(target=0.020)
LOW, HIGH = 30.0, 120.0
"""Requests per second: what full depth serves easily, and what it cannot serve at all."""
STEP, DROP, END = 20.0, 100.0, 170.0


def load(now: float) -> float:
    return HIGH if STEP <= now < DROP else LOW


def p95(values: list[float]) -> float:
    return quantiles(values, n=20)[-1]


@pytest.fixture(scope="module", params=[0.016, 0.020, 0.028], ids=["tight", "middle", "loose"])
def stepped(request: pytest.FixtureRequest) -> tuple[float, Trace]:
    """(target, trace) of a load that rises beyond full depth's capacity, and falls again."""
    return request.param, simulate(Law(request.param), load, END)


def test_full_depth_cannot_hold_the_load() -> None:
    trace = simulate(None, load, 60)
    assert p95(trace.during(0, STEP, "p95")) < LAW.target
    assert min(trace.during(STEP + 10, 60, "p95")) > LAW.target


def test_the_target_is_held_within_seconds_of_a_step(stepped: tuple[float, Trace]) -> None:
    target, trace = stepped
    assert max(trace.during(STEP, STEP + 5, "p95")) > target
    settled = trace.during(STEP + 10, DROP, "p95")
    assert p95(settled) <= target
    assert max(settled) < 1.25 * target


def test_the_pressure_does_not_oscillate(stepped: tuple[float, Trace]) -> None:
    _, trace = stepped
    settled = trace.during(STEP + 10, DROP, "pressures")
    assert max(settled) - min(settled) < 0.15
    assert trace.turns(STEP, DROP) <= 8


def test_full_depth_returns_when_the_load_has_gone(stepped: tuple[float, Trace]) -> None:
    target, trace = stepped
    assert min(trace.during(END - 10, END, "pressures")) <= 0.02
    assert p95(trace.during(DROP + 10, END, "p95")) <= target


def test_depth_is_not_given_up_without_need() -> None:
    trace = simulate(LAW, lambda _: LOW, 60)
    assert set(trace.pressures) == {0.0}


def test_long_answers_that_keep_their_threshold_do_not_upset_it() -> None:
    trace = simulate(LAW, lambda now: load(now) / 25, DROP, tokens=200)
    assert p95(trace.during(STEP + 15, DROP, "p95")) <= 1.25 * LAW.target
    assert trace.turns(STEP, DROP) <= 8


def test_an_unreachable_target_ends_at_the_floor_and_winds_nothing_up() -> None:
    trace = simulate(Law(target=0.003), lambda now: HIGH if now < 60 else 0, 120)
    assert set(trace.during(15, 60, "pressures")) == {1.0}
    assert min(trace.during(60, 70, "pressures")) < 1
    assert trace.pressures[-1] == 0
    assert trace.turns(0, 120) <= 1


@pytest.mark.parametrize("seed", range(3))
def test_a_load_at_the_edge_is_probed_ever_more_rarely(seed: int) -> None:
    trace = simulate(LAW, lambda _: 100, 240, seed=seed)
    assert trace.turns(120, 240) <= 6
    assert p95(trace.during(20, 240, "p95")) <= LAW.target


def reading(level: float, tokens: int = 100) -> Reading:
    return Reading(level * LAW.target, tokens)


def test_nothing_moves_inside_the_dead_band() -> None:
    controller = Controller(LAW)
    controller.update(0, reading(2))
    held = controller.pressure
    assert held > 0
    for second in range(1, 100):
        controller.update(second, reading(LAW.low + 0.01 if second % 2 else LAW.high - 0.01))
    assert controller.pressure == held


def test_a_move_waits_until_the_last_one_could_be_seen() -> None:
    controller = Controller(LAW)
    first = controller.update(0, reading(2))
    assert controller.update(LAW.settle / 2, reading(2)) == first
    assert controller.update(LAW.settle, reading(2)) > first


def test_a_few_tokens_are_no_evidence() -> None:
    controller = Controller(LAW)
    assert controller.update(0, reading(5, tokens=LAW.least_tokens - 1)) == 0
    assert controller.update(1, reading(5, tokens=LAW.least_tokens)) > 0


def seconds_until(controller: Controller, start: float, level: float, end: float) -> float:
    """How long readings of `level` take to bring the pressure to `end`, at most 1000 looks."""
    for look in range(1000):
        if controller.update(start + look / 2, reading(level)) == end:
            return look / 2
    raise AssertionError(f"the pressure stays at {controller.pressure}")


def test_the_pressure_rises_faster_than_it_falls() -> None:
    controller = Controller(LAW)
    rising = seconds_until(controller, 0, level=3, end=1.0)
    falling = seconds_until(controller, rising, level=0.1, end=0.0)
    assert rising <= 5
    assert 2 * rising < falling <= 60


def test_a_fall_that_had_to_be_taken_back_doubles_the_wait() -> None:
    controller = Controller(LAW)
    now, waits = 0.0, []
    for _ in range(6):
        controller.update(now, reading(1.5))
        now += LAW.settle
        held = controller.pressure
        for look in range(100):
            if controller.update(now + look / 2, reading(0.3)) < held:
                waits.append(look / 2)
                break
        now += look / 2 + LAW.settle
    assert waits[:5] == [LAW.calm * 2**n for n in range(5)]
    assert waits[5] == LAW.longest_calm


def test_slow_targets_look_back_further() -> None:
    assert Law(0.02).span == 3
    assert Law(1.0).span == 20


def test_the_lowest_floor_gives_up_most() -> None:
    floors = {"premium": 0.9, "standard": 0.5, "batch": 0.1}
    assert thresholds(0, 1.0, floors) == dict.fromkeys(floors, 1.0)
    assert thresholds(0.5, 1.0, floors) == {"premium": 0.95, "standard": 0.75, "batch": 0.55}
    assert thresholds(1, 1.0, floors) == floors


def test_no_class_rises_above_the_operators_default() -> None:
    floors = {"premium": 0.9, "batch": 0.1}
    for pressure in (0, 0.3, 1):
        chosen = thresholds(pressure, 0.6, floors)
        assert chosen["premium"] == 0.6
        assert 0.1 <= chosen["batch"] <= 0.6


def test_a_tokens_time_is_its_requests_mean() -> None:
    window = LatencyWindow(span=4)
    # One slow token and three quick ones in one answer; another answer is quick throughout.
    window.add(1, [("a", 0.4, 1), ("b", 0.1, 1)])
    window.add(2, [("a", 0.0, 3), ("b", 0.1, 1)])
    assert window.read(2) == Reading(pytest.approx(0.1), 6)


def test_the_percentile_counts_tokens() -> None:
    window = LatencyWindow(span=4)
    window.add(0, [("slow", 0.5, 5), ("quick", 1.9, 95)])
    assert window.read(0).p95 == pytest.approx(0.02)
    window.add(0, [("slow", 0.1, 1)])
    assert window.read(0).p95 == pytest.approx(0.1)


def test_the_window_forgets() -> None:
    window = LatencyWindow(span=4)
    window.add(0, [("a", 1.0, 1)])
    window.add(3, [("b", 2.0, 1)])
    assert window.read(3.9) == Reading(2.0, 2)
    assert window.read(4) == Reading(2.0, 1)
    assert window.read(4, since=3.5) == Reading(None, 0)
    assert window.read(8) == Reading(None, 0)
