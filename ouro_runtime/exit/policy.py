"""Exit policies: from what a pass saw of each row to a score that is held against a threshold.

A policy never decides by itself: `exit_mask` applies the loop limits around every policy in the
same way, so a new policy is one function that returns scores. In numpy: between two passes over a
model's weights the code of torch's dispatcher is cold.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ExitSignals:
    """What is known of N rows after a loop. Signals a policy does not need may be None.

    Attributes:
        survival: [N] float32, S(n) after this loop.
        margin: [N] float32, top-1 minus top-2 probability of the intermediate logits.
        delta: [N] float32, ||H[n] - H[n-1]|| / ||H[n]||, infinite at the first loop.
    """

    survival: np.ndarray
    margin: np.ndarray | None = None
    delta: np.ndarray | None = None


@dataclass(frozen=True)
class ExitPolicy:
    """A rule: rows whose score reaches their threshold may leave.

    Attributes:
        name: what a configuration calls it.
        score: ExitSignals -> [N] float32 in 0..1, higher is more ready to leave.
        needs: the signals beyond survival that the executor must fill in.
    """

    name: str
    score: Callable[[ExitSignals], np.ndarray]
    needs: frozenset[str] = frozenset()


def _gate(signals: ExitSignals) -> np.ndarray:
    return 1.0 - signals.survival


def _margin(signals: ExitSignals) -> np.ndarray:
    assert signals.margin is not None
    return signals.margin


def _delta(signals: ExitSignals) -> np.ndarray:
    assert signals.delta is not None
    return (1.0 - signals.delta).clip(0.0, 1.0)


POLICIES = {
    policy.name: policy
    for policy in (
        ExitPolicy("gate", _gate),
        ExitPolicy("margin", _margin, frozenset({"margin"})),
        ExitPolicy("delta", _delta, frozenset({"delta"})),
    )
}


def exit_mask(
    score: np.ndarray,
    depth: np.ndarray,
    threshold: np.ndarray,
    min_loops: np.ndarray,
    max_loops: np.ndarray,
    loops: int,
) -> np.ndarray:
    """Which rows are read out after this loop (SPEC: Q-exit, with loop limits).

    Args:
        score: [N] float32; depth: [N] integer, loops run by each row, this one included.
        threshold: [N] float32; 1 or more turns the policy off for the row.
        min_loops, max_loops: [N] integer; loops: T.

    Returns:
        [N] bool.
    """
    ready = (score >= threshold) & (threshold < 1.0) & (depth >= min_loops)
    return ready | (depth >= max_loops) | (depth >= loops)
