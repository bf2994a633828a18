"""The promise itself: how often, over many calibrations, the threshold chosen breaks it.

Calibration sets are drawn from a large pool of ouro-mini's held-out problems whose outcomes are
known at every threshold (`calibration_pool.py`), so the true loss of whatever is chosen is known.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ouro_server.bounds import at_most
from ouro_server.calibrate.choose import Point, choose
from tests.server.calibration_pool import load

DRAWS = 500
SLACK = 0.001
"""Chance that what breaks its promise exactly as often as allowed fails a test here."""

THRESHOLDS, LOST = load()
TRUE_LOSS = dict(zip(THRESHOLDS, LOST.mean(1), strict=True))

Chooser = Callable[[list[Point], float, float], float | None]


def ours(points: list[Point], loss: float, confidence: float) -> float | None:
    """The threshold that is chosen; None if nothing is promised."""
    chosen = choose(points, loss, confidence).chosen
    return None if chosen is None else chosen.threshold


def by_point_estimate(points: list[Point], loss: float, confidence: float) -> float | None:
    """The lowest threshold that lost no larger share than may be lost."""
    return min(point.threshold for point in points if point.loss <= loss)


def allowed(confidence: float) -> int:
    """Broken promises among the draws, binomial slack included."""
    return next(n for n in range(DRAWS) if at_most(n, DRAWS, 1 - confidence) >= 1 - SLACK)


def chosen(chooser: Chooser, size: int, loss: float, confidence: float) -> list[float | None]:
    """What `chooser` makes of `DRAWS` sets of `size` problems, drawn independently."""
    rng = np.random.default_rng(size)
    found = []
    for _ in range(DRAWS):
        lost = LOST[:, rng.integers(LOST.shape[1], size=size)].sum(1)
        points = [
            Point(q, size, int(count), size, size, size)
            for q, count in zip(THRESHOLDS, lost, strict=True)
        ]
        found.append(chooser(points, loss, confidence))
    return found


def broken(thresholds: list[float | None], loss: float) -> int:
    return sum(q is not None and TRUE_LOSS[q] > loss for q in thresholds)


@pytest.mark.parametrize("confidence", [0.95, 0.8])
@pytest.mark.parametrize(("size", "loss"), [(400, 0.01), (1000, 0.01), (400, 0.02)])
def test_the_promise_is_broken_no_more_often_than_allowed(
    size: int, loss: float, confidence: float
) -> None:
    found = chosen(ours, size, loss, confidence)
    assert broken(found, loss) <= allowed(confidence)
    assert sum(q is not None and q < 1 for q in found) > DRAWS / 3, "it must not win by silence"


@pytest.mark.parametrize(("size", "loss"), [(400, 0.01), (1000, 0.01)])
def test_choosing_by_the_point_estimate_breaks_it(size: int, loss: float) -> None:
    """So the test above can fail."""
    assert broken(chosen(by_point_estimate, size, loss, 0.95), loss) > allowed(0.8)


def test_the_pool_can_tell_a_kept_promise_from_a_broken_one() -> None:
    """Thresholds on both sides of what is promised."""
    assert LOST.shape[1] >= 1000
    for loss in (0.01, 0.02):
        assert min(TRUE_LOSS.values()) < loss < max(TRUE_LOSS.values())
