"""The latency controller at work: readings in, default thresholds out, on the event loop."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

from ouro_runtime.reports import DepthReport
from ouro_server.controller import Controller, Law, thresholds
from ouro_server.defaults import Defaults
from ouro_server.latency import LatencyWindow
from ouro_server.metrics import ServerMetrics

PERIOD = 0.5
"""Seconds between two looks at the window."""

logger = logging.getLogger(__name__)


class Steering:
    """Holds a target time per output token by moving the defaults of requests that set no depth.

    A request keeps the threshold it was admitted with, so a change is seen as soon as new requests
    are: answers of minutes answer in minutes.

    Args:
        law: the control law.
        defaults: steered between each class's floor and the operator's own default.
        floors: priority class -> the lowest threshold it may be given.
        metrics: told about every reading and change.
        clock: rising seconds.
    """

    def __init__(
        self,
        law: Law,
        defaults: Defaults,
        floors: Mapping[str, float],
        metrics: ServerMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.law = law
        self.active = False
        self.p95: float | None = None
        self._defaults = defaults
        self._floors = floors
        self._metrics = metrics
        self._clock = clock
        self._controller = Controller(law)
        self._window = LatencyWindow(law.span)
        self._metrics.show_controller(False, law.target)

    @property
    def pressure(self) -> float:
        """How much depth is given up: 0 none, 1 down to every floor."""
        return self._controller.pressure

    def hear(self, report: DepthReport) -> None:
        """Note what an engine iteration delivered."""
        if report.deliveries:
            self._window.add(self._clock(), report.deliveries)

    def look(self) -> None:
        """Read the window once and steer."""
        now = self._clock()
        before = self.pressure
        reading = self._window.read(now, self._controller.moved_at)
        after = self._controller.update(now, reading)
        self.p95 = self._window.read(now).p95
        self._metrics.show_reading(self.p95)
        if after != before:
            self._metrics.count_change("down" if after > before else "up")
        ceiling = self._defaults.base.exit_threshold
        self._defaults.steer(thresholds(after, ceiling, self._floors) if after else {})

    async def run(self) -> None:
        """Steer until cancelled. If it fails, the operator's defaults are in force again."""
        self.active = True
        self._metrics.show_controller(True, self.law.target)
        try:
            while True:
                await asyncio.sleep(PERIOD)
                self.look()
        except Exception:
            logger.exception("the latency controller stopped; default depth is back in force")
        finally:
            self.active = False
            self._metrics.show_controller(False, self.law.target)
            self._defaults.steer({})
