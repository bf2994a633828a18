"""Whom to draft in a step, and where: decided in the scheduler, so that all ranks do the same.

The device's verdicts come back a step or two after it gave them; what they teach is the same
`DraftRule` that the CPU engine asks after every pass. Here it is asked before the step, for every
loop and class of the gate's CDF that the request is known to pass through.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ouro_runtime.config import ExitParams
from ouro_runtime.engine.step_output import CDF_STEPS, COUNTS
from ouro_runtime.loop.drafts import CLASSES, DraftRule

KINDS = len(CLASSES) + 1
LOOPS = 10
"""Loops after which a `guided` request may be drafted: as many as have room in a number's bits."""

KNOWN = 4
"""Tokens after which a request is taken to pass through no other classes than it has."""

_PICK = [COUNTS.index(name) for name in ("depths", "drafts")]


@dataclass
class _Seat:
    """Where the rule keeps its record of a request, and what the gate said of its tokens so far:
    bit `loop * KINDS + class`, by 0-based loop."""

    number: int
    seen: int = 0
    tokens: int = 0


class DraftChoice:
    """Chooses, and learns from what was right.

    Args:
        loops: T. lanes: of a step with drafts at most, see `draft_lanes`; 0: never draft.
    """

    def __init__(self, loops: int, lanes: int) -> None:
        self.loops, self.lanes = loops, lanes
        self.rule = DraftRule(loops)
        self._seats: dict[str, _Seat] = {}
        self._free: list[int] = []
        self._bits = np.arange(KINDS * min(loops - 1, LOOPS))

    def choose(self, asked: Mapping[str, ExitParams], requests: int) -> dict[str, int]:
        """Who is drafted in a step, as far as there is room: by name, the loops and classes where
        (bits, as in `_Seat`), or 0 where the request's own exit rule says.

        Args:
            asked: exit controls of those that may be (`draft_rule`). requests: of the step.
        """
        room = (self.lanes - requests) // max(1, self.loops - 1)
        chosen: dict[str, int] = {}
        for name, params in asked.items():
            if len(chosen) >= room:
                break
            where = self._where(name, params) if params.guided else 0
            if where or not params.guided:
                chosen[name] = where
        return chosen

    def _where(self, name: str, params: ExitParams) -> int:
        """What the rule says of a `guided` request."""
        seat = self._seat(name)
        loop, kind = np.divmod(self._bits, KINDS)
        asked = (loop + 1 >= params.min_loops) & (loop + 1 <= params.max_loops)
        if seat.tokens >= KNOWN:
            asked &= (seat.seen >> self._bits) % 2 == 1
        bits = self._bits[asked]
        cdf = np.array([0.0, *CLASSES])[kind[asked]]
        yes = self.rule.drafts(np.full(len(bits), seat.number), loop[asked] + 1, cdf)
        return int((1 << bits[yes]).sum())

    def _seat(self, name: str) -> _Seat:
        seat = self._seats.get(name)
        if seat is None:
            number = self._free.pop() if self._free else len(self._seats)
            seat = self._seats[name] = _Seat(number)
            self.rule.open(number)
        return seat

    def learn(self, name: str, notes: np.ndarray) -> None:
        """Take in a request's tokens, and which of its drafts were right.

        Args:
            notes: see `pack_notes`.
        """
        seat = self._seats.get(name)
        if seat is None or not len(notes):
            return
        cdf = notes[:, len(COUNTS) :] / CDF_STEPS
        kind = np.searchsorted(CLASSES, cdf, side="right")
        loop = np.arange(self._bits[-1] // KINDS + 1)
        seat.seen |= int(np.bitwise_or.reduce(1 << (loop * KINDS + kind[:, loop]), axis=None))
        seat.tokens += len(notes)
        depth, drafted = notes[:, _PICK].T
        told = np.nonzero(drafted)[0]
        at = drafted[told].astype(np.int64)
        self.rule.learn(
            np.full(len(told), seat.number), at, cdf[told, at - 1], depth[told] == drafted[told]
        )

    def close(self, name: str) -> None:
        """A request has ended."""
        seat = self._seats.pop(name, None)
        if seat is not None:
            self._free.append(seat.number)
