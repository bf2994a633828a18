"""When to draft: which early read-outs are likely right, and whether drafts pay. Plain numpy.

A draft at loop d that is right saves T - d passes of its request; one that is wrong costs the rows
that were started after it. Nothing here changes an answer: only when it is known, and what it
costs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ouro_runtime.config import LOSSLESS, ExitParams

CLASSES = (0.1, 0.5)
"""Bounds of the classes of the gate's CDF: a gate that knows tells them apart, one that does not
makes them alike."""

HOPE = (3.0, 4.0)
"""(right, tried): what is taken for granted of drafts at a loop before any was tried."""

REMEMBERED = 64.0
"""Drafts of all requests, by loop and class, that the rule looks back on."""

PRIOR = 4.0
"""Drafts of its own that weigh as much in a request's record as all others'."""

FIRST_WAIT, LONGEST_WAIT = 16, 1024
"""Read-outs passed by before a loop and class that did not pay is tried again."""


def draft_rule(params: ExitParams, single: bool, loops: int) -> tuple[float, int, int] | None:
    """(threshold, least, most loops) of the exit rule of a request's drafts, where the same one
    holds for all of them; None if it is not drafted. A `guided` request's fires at no draft: the
    `DraftRule` says where to.

    Args:
        single: at most one token in a step. loops: T.
    """
    if params.exit_mode != LOSSLESS or single or loops < 2:
        return None
    if params.guided:
        return 1.0, 1, loops
    if params.forced_depths:
        low, high = min(params.forced_depths), max(params.forced_depths)
        return (1.0, low, high) if low == high < loops else None
    threshold, most = params.exit_threshold, params.max_loops
    never = params.min_loops == loops or (threshold >= 1 and most == loops)
    return None if never else (threshold, params.min_loops, most)


class DraftRule:
    """Learns from the share of right drafts, by loop and class of the gate's CDF: of all requests,
    and of each one.

    A draft at loop d is made if it is expected to save more than waiting for loop d + 1 could: if
    it is right with a probability of (T - d - 1) / (T - d) or more, and never below a half.

    Args:
        loops: T.
    """

    def __init__(self, loops: int) -> None:
        shape = (loops, len(CLASSES) + 1)
        ahead = loops - np.arange(loops)  # by loop d, from 0
        self._need = np.maximum(0.5, (ahead - 1) / ahead)
        self._right, self._tried = np.full(shape, HOPE[0]), np.full(shape, HOPE[1])
        self._own = np.zeros((2, 1, *shape))
        self._passed = np.zeros(shape, np.int64)
        self._wait = np.full(shape, FIRST_WAIT, np.int64)

    def open(self, seat: int) -> None:
        """A request takes `seat`."""
        while seat >= self._own.shape[1]:
            self._own = np.concatenate([self._own, np.zeros_like(self._own)], axis=1)
        self._own[:, seat] = 0

    def drafts(self, seat: np.ndarray, depth: np.ndarray, cdf: np.ndarray) -> np.ndarray:
        """Which of the heads [K] are to be drafted.

        Args:
            seat: of their requests. depth: loops run, below T. cdf: the gate's CDF after them.
        """
        kind = np.searchsorted(CLASSES, cdf, side="right")
        right, tried = self._own[:, seat, depth, kind]
        share = self._right[depth, kind] / self._tried[depth, kind]
        drafts = (PRIOR * share + right) / (PRIOR + tried) >= self._need[depth]
        for place in np.nonzero(~drafts)[0].tolist():
            at = depth[place], kind[place]
            self._passed[at] += 1
            if self._passed[at] >= self._wait[at]:
                drafts[place], self._passed[at] = True, 0
                self._wait[at] = min(2 * self._wait[at], LONGEST_WAIT)
        return drafts

    def learn(
        self, seat: np.ndarray, depth: np.ndarray, cdf: np.ndarray, right: np.ndarray
    ) -> None:
        """Whether drafts [K] were right; arguments as in `drafts`, at the time of the draft."""
        kind = np.searchsorted(CLASSES, cdf, side="right")
        for who, at, hit in zip(seat, zip(depth, kind, strict=True), right, strict=True):
            if self._tried[at] >= REMEMBERED:
                self._right[at] *= 0.75
                self._tried[at] *= 0.75
            self._tried[at] += 1
            self._right[at] += hit
            self._own[0, who][at] += hit
            self._own[1, who][at] += 1
            if hit:
                self._wait[at] = FIRST_WAIT


TRY, LOOK_AGAIN, LONGEST_LOOK = 6, 16, 256
"""Decoding steps for which each choice is tried, after which the other one is tried again, and
after which at the latest: each time that a choice is confirmed it stands twice as long."""


@dataclass
class _Choice:
    """The last steps with drafts, or without, at about one batch size: (seconds, tokens) each."""

    steps: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=2 * LOOK_AGAIN))

    @property
    def cost(self) -> float:
        """Seconds of a step over its tokens. The median of the seconds, for a slow step is another
        program's doing; the mean of the tokens, for with drafts they come in bursts."""
        seconds, tokens = zip(*self.steps, strict=True)
        return float(np.median(seconds)) / max(float(np.mean(tokens)), 1e-9)


@dataclass
class _Size:
    """What is known of a batch size; `switched`: the next step still has what the choice before
    left in flight."""

    choices: Sequence[_Choice] = field(default_factory=lambda: (_Choice(), _Choice()))
    drafting: bool = True
    switched: bool = True
    left: int = TRY
    settled: bool = False
    best: bool | None = None
    stands: int = LOOK_AGAIN

    def switch(self, drafting: bool) -> None:
        self.switched = drafting != self.drafting
        self.drafting = drafting

    def settle(self) -> None:
        """Both choices were tried."""
        best = self.choices[True].cost <= self.choices[False].cost
        self.stands = min(2 * self.stands, LONGEST_LOOK) if best == self.best else LOOK_AGAIN
        self.best, self.settled, self.left = best, True, self.stands
        self.switch(best)


class DraftTrial:
    """Whether drafts pay, found out by trying: not where a further row costs what it saves.

    By batch size, in powers of two: a few steps with drafts, as many without, then what was faster
    per token; and again after a while. In the scheduler, so that all ranks of an engine do the
    same.
    """

    def __init__(self) -> None:
        self._sizes: dict[int, _Size] = {}

    def decide(self, requests: int) -> bool:
        """Whether lossless requests are drafted in a step of so many requests."""
        return self._size(requests).drafting

    def note(self, requests: int, seconds: float, tokens: int) -> None:
        """A step in which all requests were decoding took so long, and brought so many tokens."""
        size = self._size(requests)
        if not size.switched:
            size.choices[size.drafting].steps.append((seconds, tokens))
        size.switched = False
        size.left -= 1
        if size.left > 0:
            return
        if size.settled or not size.choices[not size.drafting].steps:
            # Try the other choice, with an open mind.
            size.settled, size.left = False, TRY
            size.switch(not size.drafting)
            size.choices[size.drafting].steps.clear()
        else:
            size.settle()

    def _size(self, requests: int) -> _Size:
        return self._sizes.setdefault(requests.bit_length(), _Size())
