"""The latency controller between the engine's reports and the defaults, on the test's own clock."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from ouro_runtime.config import ExitParams
from ouro_runtime.reports import Delivery, DepthReport
from ouro_server import steering as module
from ouro_server.agreement import Agreement, Rule
from ouro_server.controller import Law
from ouro_server.defaults import Defaults
from ouro_server.metrics import ServerMetrics
from ouro_server.steering import Steering

FLOORS = {"premium": 0.9, "batch": 0.1}
TARGET = 0.02
LAW = Law(TARGET)


class Bench:
    """A steering with everything around it."""

    def __init__(
        self,
        threshold: float = 1.0,
        law: Law | None = LAW,
        agreement: Agreement | None = None,
    ) -> None:
        self.now = 100.0
        self.registry = CollectorRegistry()
        self.defaults = Defaults(ExitParams(threshold, 1, 4, "skip"), 4)
        metrics = ServerMetrics("m", 4, (), FLOORS, self.registry)
        self.steering = Steering(law, self.defaults, FLOORS, metrics, lambda: self.now, agreement)

    def run(self, seconds: int, seconds_per_token: float | None) -> None:
        """Let answers flow at this pace, if any, with a look every second."""
        for second in range(seconds):
            self.now += 1
            if seconds_per_token is not None:
                deliveries = [Delivery(f"{second}-{i}", 4 * seconds_per_token, 4) for i in range(9)]
                self.steering.hear(DepthReport(deliveries=deliveries))
            self.steering.look()

    def in_force(self, priority_class: str | None) -> float:
        return self.defaults.for_class(priority_class).exit_threshold

    def metric(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(
            f"ouro_controller_{name}", {"model_name": "m"} | labels
        )


def test_slow_tokens_lower_the_defaults_down_to_the_floors_and_no_further() -> None:
    bench = Bench()
    bench.run(3, 2 * TARGET)
    assert FLOORS["batch"] < bench.in_force("batch") < bench.in_force("premium") < 1
    bench.run(20, 2 * TARGET)
    assert {name: bench.in_force(name) for name in FLOORS} == FLOORS
    assert bench.in_force(None) == 1
    assert bench.steering.pressure == 1


def test_quick_tokens_leave_the_operators_default() -> None:
    bench = Bench(threshold=0.7)
    bench.run(20, TARGET / 4)
    assert bench.in_force("batch") == 0.7
    assert bench.steering.pressure == 0
    assert bench.steering.p95 == pytest.approx(TARGET / 4)


def test_depth_returns_when_nobody_asks() -> None:
    bench = Bench()
    bench.run(10, 2 * TARGET)
    bench.run(90, None)
    assert bench.in_force("batch") == 1
    assert bench.steering.p95 is None


def test_the_operators_default_is_the_ceiling_also_when_it_changes() -> None:
    bench = Bench()
    bench.run(2, 2 * TARGET)
    bench.defaults.change({"exit_threshold": 0.5})
    bench.run(1, 0.8 * TARGET)
    assert bench.in_force("premium") == 0.5
    assert 0.1 < bench.in_force("batch") < 0.5


def test_metrics_follow() -> None:
    bench = Bench()
    assert bench.metric("target_seconds") == TARGET
    bench.run(10, 2 * TARGET)
    down = bench.metric("changes_total", direction="down")
    assert bench.metric("p95_seconds") == pytest.approx(2 * TARGET)
    assert down is not None and down > 0
    assert bench.metric("changes_total", direction="up") == 0
    bench.run(60, None)
    up = bench.metric("changes_total", direction="up")
    assert up is not None and up > 0
    assert bench.metric("changes_total", direction="down") == down


def test_it_runs_until_cancelled_and_leaves_the_operators_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "PERIOD", 0.001)
    bench = Bench()

    async def live() -> None:
        task = asyncio.create_task(bench.steering.run())
        for _ in range(200):
            bench.now += 1
            bench.steering.hear(DepthReport(deliveries=[Delivery("a", 8 * TARGET, 4)] * 4))
            await asyncio.sleep(0.002)
            if bench.steering.pressure > 0.5:
                break
        assert bench.steering.active and bench.metric("active") == 1
        assert bench.in_force("batch") < 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(live())
    assert not bench.steering.active and bench.metric("active") == 0
    assert bench.in_force("batch") == 1


def test_a_controller_that_fails_gives_the_defaults_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "PERIOD", 0.001)
    bench = Bench()
    bench.defaults.steer({"batch": 0.2})

    def broken() -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(bench.steering, "look", broken)
    asyncio.run(bench.steering.run())
    assert bench.in_force("batch") == 1
    assert not bench.steering.active
    assert "default depth is back" in caplog.text


RULE = Rule(target=0.9)


def agreed(audits: int, name: str = "batch", agrees: bool = True) -> Agreement:
    """What is allowed after so many audits of one class."""
    agreement = Agreement(RULE, FLOORS, 1.0, True)
    hear(agreement, audits, name, agrees)
    return agreement


def hear(
    agreement: Agreement | None, audits: int, name: str = "batch", agrees: bool = True
) -> None:
    assert agreement is not None
    for _ in range(audits):
        if (ticket := agreement.assign(name)) is not None:
            agreement.hear(ticket, agrees)


def test_an_agreement_alone_gives_each_class_the_lowest_threshold_that_is_proven() -> None:
    bench = Bench(law=None, agreement=agreed(2 * RULE.audits(0)))
    bench.run(1, None)
    assert (bench.in_force("batch"), bench.in_force("premium")) == (0.7, 1.0)
    assert bench.in_force(None) == 1
    assert bench.steering.gave_way == ()
    assert bench.metric("active") == 0


def test_with_both_targets_a_quiet_server_runs_at_the_operators_default() -> None:
    bench = Bench(agreement=agreed(10_000))
    bench.run(5, TARGET / 4)
    assert bench.in_force("batch") == 1


def test_with_both_targets_latency_takes_what_agreement_allows() -> None:
    bench = Bench(agreement=agreed(2 * RULE.audits(0)))
    bench.run(20, 2 * TARGET)
    assert (bench.in_force("batch"), bench.in_force("premium")) == (0.7, 1.0)
    assert bench.steering.gave_way == ("latency",)
    assert gave_way(bench) == {"latency": 1, "agreement": 0}
    bench.run(20, TARGET / 4)
    assert gave_way(bench) == {"latency": 0, "agreement": 0}


def test_down_to_the_floors_nobody_gave_way_to_agreement() -> None:
    bench = Bench(agreement=agreed(10_000))
    hear(bench.steering.agreement, 10_000, "premium")
    bench.run(20, 2 * TARGET)
    assert {name: bench.in_force(name) for name in FLOORS} == FLOORS
    assert bench.steering.gave_way == ()


def test_pressure_that_agreement_holds_back_is_not_wound_up() -> None:
    bench = Bench(agreement=agreed(2 * RULE.audits(0)))
    bench.run(60, 2 * TARGET)
    assert bench.steering.pressure == pytest.approx(2 / RULE.rungs)
    bench.run(20, TARGET / 10)
    assert bench.in_force("batch") > 0.7


def test_a_withdrawn_threshold_is_out_of_force_at_the_next_look() -> None:
    bench = Bench(law=None, agreement=agreed(10_000))
    bench.run(1, None)
    assert bench.in_force("batch") == 0.1
    hear(bench.steering.agreement, 10_000, agrees=False)
    bench.run(1, None)
    assert bench.in_force("batch") == 1
    withdrawn = bench.registry.get_sample_value(
        "ouro_agreement_trials_total", {"model_name": "m", "outcome": "withdrawn"}
    )
    assert withdrawn == RULE.rungs


def test_agreement_gives_way_where_the_operators_default_loses_too_much() -> None:
    agreement = Agreement(RULE, FLOORS, 0.5, False)
    hear(agreement, RULE.spare + 1, agrees=False)
    bench = Bench(threshold=0.5, law=None, agreement=agreement)
    bench.run(1, None)
    assert bench.steering.gave_way == ("agreement",)
    assert gave_way(bench) == {"latency": 0, "agreement": 1}
    assert bench.in_force("batch") == 0.5


@pytest.mark.parametrize(
    "change",
    [{"exit_threshold": 0.8}, {"exit_mode": "shared"}, {"max_loops": 3}, {"min_loops": 2}],
    ids=str,
)
def test_another_default_of_the_operators_has_to_be_proven_anew(change: dict[str, Any]) -> None:
    bench = Bench(law=None, agreement=agreed(10_000))
    bench.run(1, None)
    assert bench.in_force("batch") == 0.1
    bench.defaults.change(change)
    bench.run(1, None)
    assert bench.in_force("batch") == change.get("exit_threshold", 1.0)


def test_shared_runs_every_loop_and_has_to_be_proven_all_the_same() -> None:
    bench = Bench(law=None, agreement=agreed(10_000))
    bench.defaults.change({"exit_mode": "shared"})
    bench.run(1, None)
    agreement = bench.steering.agreement
    assert agreement is not None
    assert agreement.trial("batch") == 1.0


def test_with_the_steering_trials_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PERIOD", 0.001)
    agreement = agreed(10)
    bench = Bench(law=None, agreement=agreement)
    assert agreement.assign("batch") is not None
    monkeypatch.setattr(bench.steering, "look", lambda: 1 / 0)
    asyncio.run(bench.steering.run())
    assert agreement.assign("batch") is None


def gave_way(bench: Bench) -> dict[str, float | None]:
    return {
        target: bench.registry.get_sample_value(
            "ouro_target_gave_way", {"model_name": "m", "target": target}
        )
        for target in ("latency", "agreement")
    }
