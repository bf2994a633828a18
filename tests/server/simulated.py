"""A queue of requests behind a looped engine, in simulated time: the controller's sparring partner.

Poisson arrivals; a step costs a fixed time and one per running request, and runs T loops of every
request, so that shallow tokens come several to a step; more requests than seats wait. A request
keeps the threshold it was admitted with.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from ouro_server.controller import Controller, Law
from ouro_server.latency import LatencyWindow

LOOPS = 4
TICK = 0.5


def mean_depth(threshold: float) -> float:
    """A plausible gate: every loop at 1, most of the saving already a little below."""
    return LOOPS if threshold >= 1 else 1 + 2.2 * threshold**2


@dataclass
class Request:
    name: str
    threshold: float
    left: int
    loops: float = 0.0
    last: float | None = None


@dataclass
class Trace:
    """What happened: one entry per tick."""

    times: list[float] = field(default_factory=list)
    p95: list[float] = field(default_factory=list)
    pressures: list[float] = field(default_factory=list)

    def during(self, start: float, end: float, values: str) -> list[float]:
        series = getattr(self, values)
        return [v for t, v in zip(self.times, series, strict=True) if start <= t < end]

    def turns(self, start: float, end: float) -> int:
        """Changes of the pressure's direction."""
        series = self.during(start, end, "pressures")
        signs = [b > a for a, b in pairwise(series) if a != b]
        return sum(a != b for a, b in pairwise(signs))


def simulate(
    law: Law | None,
    arrivals: Callable[[float], float],
    seconds: float,
    *,
    tokens: int = 8,
    seats: int = 32,
    fixed: float = 0.008,
    per_request: float = 0.0008,
    floor: float = 0.3,
    seed: int = 1,
) -> Trace:
    """Run for `seconds`; `arrivals` gives the rate per second at a time. No law: full depth."""
    rng = random.Random(seed)
    controller = Controller(law) if law else None
    window = LatencyWindow(law.span if law else 3.0)
    waiting: deque[Request] = deque()
    running: list[Request] = []
    trace = Trace()
    now, next_arrival, next_tick, number = 0.0, 0.0, TICK, 0
    while now < seconds:
        while next_arrival <= now:
            rate = arrivals(next_arrival)
            if rate == 0:
                next_arrival += 0.1
                continue
            pressure = controller.pressure if controller else 0.0
            waiting.append(Request(str(number), 1 - pressure * (1 - floor), tokens))
            number += 1
            next_arrival += rng.expovariate(rate)
        while waiting and len(running) < seats:
            running.append(waiting.popleft())
        now += fixed + per_request * len(running)
        window.add(now, _step(running, now, rng))
        running = [r for r in running if r.left > 0]
        if now >= next_tick:
            next_tick += TICK
            reading = window.read(now, controller.moved_at if controller else 0.0)
            if controller:
                controller.update(now, reading)
            trace.times.append(now)
            trace.p95.append(window.read(now).p95 or 0.0)
            trace.pressures.append(controller.pressure if controller else 0.0)
    return trace


def _step(running: list[Request], now: float, rng: random.Random) -> list[tuple[str, float, int]]:
    """Advance every request by T loops; the deliveries after each one's first."""
    deliveries = []
    for request in running:
        request.loops += LOOPS
        made = 0
        while request.left > 0 and request.loops >= 1:
            mean = mean_depth(request.threshold)
            depth = min(LOOPS, max(1, round(rng.gauss(mean, 0.7)))) if mean < LOOPS else LOOPS
            if depth > request.loops:
                break
            request.loops -= depth
            request.left -= 1
            made += 1
        if made and request.last is not None:
            deliveries.append((request.name, now - request.last, made))
        if made:
            request.last = now
    return deliveries
