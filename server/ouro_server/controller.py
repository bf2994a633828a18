"""The control law that holds a target time per output token by giving up depth.

One number, the pressure, stands for how much depth is given up: at 0 every priority class has the
operator's default threshold, at 1 every class stands at its floor. The law raises the pressure
quickly, lowers it slowly, and after a move looks only at what was delivered since. It knows no
clock and no server: time and readings are arguments.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ouro_server.latency import Reading


@dataclass(frozen=True)
class Law:
    """The constants of the control law.

    Attributes:
        target: seconds per output token that the 95th percentile shall not exceed.
        high, low: shares of the target. Above `high` the pressure rises, below `low` it may fall,
            between them nothing moves.
        settle: seconds after a move before the next one; what was delivered sooner was on its way.
        least_tokens: a reading of fewer tokens is not acted upon.
        gain, least_rise, most_rise: a rise is `gain` times the logarithm of the excess, bounded.
        most_fall: a fall is `gain` times the logarithm of the slack, at most this.
        calm, longest_calm: seconds of slack before the pressure falls. A fall that had to be taken
            back doubles them, so that a load at the edge is probed ever more rarely; one that held
            brings them back.
    """

    target: float
    high: float = 0.9
    low: float = 0.7
    settle: float = 1.0
    least_tokens: int = 8
    gain: float = 0.4
    least_rise: float = 0.02
    most_rise: float = 0.25
    most_fall: float = 0.1
    calm: float = 2.0
    longest_calm: float = 32.0

    @property
    def span(self) -> float:
        """Seconds a reading should look back: a few, and enough for tokens as slow as allowed."""
        return max(3.0, 20 * self.target)


class Controller:
    """The law with its state. `update` with rising times; read `pressure`."""

    def __init__(self, law: Law) -> None:
        self.law = law
        self.pressure = 0.0
        self.moved_at = -math.inf
        self._slack_since: float | None = None
        self._calm = law.calm
        self._fell = False

    def update(self, now: float, reading: Reading) -> float:
        """The pressure after `reading`, which holds what was delivered since `moved_at`."""
        law = self.law
        if now < self.moved_at + law.settle:
            return self.pressure
        if 0 < reading.tokens < law.least_tokens:
            return self.pressure
        level = (reading.p95 or 0.0) / law.target
        if level > law.high:
            self._slack_since = None
            self._rise(now, level)
        elif level < law.low:
            self._slack_since = now if self._slack_since is None else self._slack_since
            if now >= self._slack_since + self._calm:
                self._fall(now, level)
        else:
            self._slack_since = None
        return self.pressure

    def limit(self, most: float) -> None:
        """More pressure than `most` would have no effect, so none is wound up."""
        self.pressure = min(self.pressure, most)

    def _rise(self, now: float, level: float) -> None:
        law = self.law
        if self._fell:
            self._calm = min(2 * self._calm, law.longest_calm)
        self._fell = False
        step = law.gain * math.log(level / law.high)
        self._move(now, self.pressure + min(max(step, law.least_rise), law.most_rise))

    def _fall(self, now: float, level: float) -> None:
        law = self.law
        if self._fell or self.pressure == 0:
            self._calm = law.calm
        self._fell = self.pressure > 0
        self._slack_since = None
        step = law.gain * math.log(law.low / level) if level > 0 else law.most_fall
        self._move(now, self.pressure - min(step, law.most_fall))

    def _move(self, now: float, pressure: float) -> None:
        pressure = min(max(pressure, 0.0), 1.0)
        if pressure != self.pressure:
            self.pressure = pressure
            self.moved_at = now


def thresholds(
    pressure: float,
    ceiling: float,
    floors: Mapping[str, float],
    allowed: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Each priority class's default threshold under `pressure`.

    It lies between the operator's default (`ceiling`) and the class's floor, in proportion: the
    class with the lowest floor gives up most. A floor above the ceiling leaves the ceiling. A class
    in `allowed` is under no more pressure than is said there.
    """
    allowed = allowed or {}
    return {
        name: round(ceiling - min(pressure, allowed.get(name, 1.0)) * max(ceiling - floor, 0.0), 4)
        for name, floor in floors.items()
    }
