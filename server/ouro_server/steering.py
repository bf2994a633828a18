"""Targets at work: readings and audits in, default thresholds out, on the event loop."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

from ouro_runtime.reports import DepthReport
from ouro_server.agreement import Agreement
from ouro_server.controller import Controller, Law, thresholds
from ouro_server.defaults import Defaults
from ouro_server.latency import LatencyWindow
from ouro_server.metrics import ServerMetrics

PERIOD = 0.5
"""Seconds between two looks at the window."""

LATENCY, AGREEMENT = "latency", "agreement"
"""The targets that may have to give way."""

logger = logging.getLogger(__name__)


class Steering:
    """Holds targets by moving the defaults of requests that set no depth.

    A time per output token asks for low thresholds under load; an agreement allows only those that
    audits have proven. Each class gets the higher of the two. Without a time to hold, each gets the
    lowest that is allowed.

    A request keeps the threshold it was admitted with, so a change is seen as soon as new requests
    are: answers of minutes answer in minutes.

    Args:
        law: the control law of the time per output token; None if none is held.
        defaults: steered between each class's floor and the operator's own default.
        floors: priority class -> the lowest threshold it may be given.
        metrics: told about every reading and change.
        clock: rising seconds.
        agreement: what audits allow; None if no agreement is held.
    """

    def __init__(
        self,
        law: Law | None,
        defaults: Defaults,
        floors: Mapping[str, float],
        metrics: ServerMetrics,
        clock: Callable[[], float] = time.monotonic,
        agreement: Agreement | None = None,
    ) -> None:
        assert law is not None or agreement is not None
        self.law = law
        self.agreement = agreement
        self.active = False
        self.p95: float | None = None
        self.gave_way: tuple[str, ...] = ()
        self._defaults = defaults
        self._base = defaults.base
        self._floors = floors
        self._metrics = metrics
        self._clock = clock
        self._controller = Controller(law) if law else None
        self._window = LatencyWindow(law.span) if law else None
        self._show(False)

    @property
    def pressure(self) -> float:
        """How much depth is asked to be given up: 0 none, 1 down to every floor."""
        return self._controller.pressure if self._controller else 1.0

    def hear(self, report: DepthReport) -> None:
        """Note what an engine iteration delivered."""
        if report.deliveries and self._window:
            self._window.add(self._clock(), report.deliveries)

    def look(self) -> None:
        """Read the window once and steer."""
        base, agreement = self._defaults.base, self.agreement
        allowed: dict[str, float] = {}
        if agreement is not None:
            if base != self._base:
                # What was proven was so at the other controls: a mode's answers are not another's.
                agreement.start(base.exit_threshold, self._defaults.whole)
            self._base = base
            allowed = {name: agreement.allowed(name) for name in self._floors}
        if self._controller is not None:
            self._read(self._controller, max(allowed.values(), default=1.0))
        after = self.pressure
        chosen = thresholds(after, base.exit_threshold, self._floors, allowed) if after else {}
        self._defaults.steer(chosen)
        self.gave_way = self._givers(allowed)
        self._metrics.targets.show(self.gave_way, agreement)

    def _read(self, controller: Controller, most: float) -> None:
        assert self._window is not None
        now, before = self._clock(), controller.pressure
        after = controller.update(now, self._window.read(now, controller.moved_at))
        controller.limit(most)
        after = controller.pressure
        self.p95 = self._window.read(now).p95
        self._metrics.show_reading(self.p95)
        if after != before:
            self._metrics.count_change("down" if after > before else "up")

    def _givers(self, allowed: Mapping[str, float]) -> tuple[str, ...]:
        """The targets that are missed though the other one, or the operator's default, is all that
        stands in the way."""
        held = any(most < 1 and self.pressure >= most for most in allowed.values())
        slow = self.law is not None and self.p95 is not None and self.p95 > self.law.target
        missed = self.agreement is not None and bool(self.agreement.missed)
        return (LATENCY,) * (held and slow) + (AGREEMENT,) * missed

    def _show(self, active: bool) -> None:
        self.active = active
        self._metrics.show_controller(active and self.law is not None, self._target)

    @property
    def _target(self) -> float:
        return self.law.target if self.law else 0.0

    async def run(self) -> None:
        """Steer until cancelled. If it fails, the operator's defaults are in force again."""
        self._show(True)
        try:
            while True:
                await asyncio.sleep(PERIOD)
                self.look()
        except Exception:
            logger.exception("steering stopped; default depth is back in force")
        finally:
            self._show(False)
            self._defaults.steer({})
            if self.agreement is not None:
                self.agreement.stopped = True
