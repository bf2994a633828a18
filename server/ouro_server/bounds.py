"""Exact binomial bounds: how often something happens, from how often it was seen.

C. J. Clopper and E. S. Pearson, "The use of confidence or fiducial limits illustrated in the case
of the binomial", Biometrika 26 (1934).
"""

import math
from functools import cache

import numpy as np

_HALVINGS = 60


def at_most(seen: int, trials: int, rate: float) -> float:
    """P(Binomial(trials, rate) <= seen): the p-value of "it happens at least that often".

    Args:
        seen: 0..trials. rate: above 0 and below 1.
    """
    if seen >= trials:
        return 1.0
    first = trials * math.log1p(-rate)
    i = np.arange(seen)
    steps = np.log((trials - i) / (i + 1)) + math.log(rate) - math.log1p(-rate)
    logs = first + np.concatenate([[0.0], np.cumsum(steps)])
    most = logs.max()
    return min(1.0, math.exp(most) * float(np.exp(logs - most).sum()))


@cache
def upper_bound(seen: int, trials: int, confidence: float) -> float:
    """The one-sided Clopper-Pearson bound: a rate above it would have shown more than `seen` of
    `trials` with probability `confidence`."""
    if seen >= trials:
        return 1.0
    low, high = seen / trials, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if at_most(seen, trials, middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


@cache
def trials_needed(rate: float, confidence: float, seen: int = 0) -> int:
    """The fewest trials of which `seen` bound the rate by `rate`."""

    def enough(trials: int) -> bool:
        return at_most(seen, trials, rate) <= 1 - confidence

    low, high = seen, seen + 1
    while not enough(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
