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


def _below(loops: int) -> int:
    """The bits of what is read out after fewer loops than so many."""
    return 1 << KINDS * min(loops - 1, LOOPS)


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
        room = max(0, self.lanes - requests) // max(1, self.loops - 1)
        guided = {name: params for name, params in asked.items() if params.guided}
        where = self._where(guided) if guided and room else {}
        chosen = [(name, where.get(name, 0)) for name in asked if where.get(name) != 0]
        return dict(chosen[:room])

    def _where(self, guided: Mapping[str, ExitParams]) -> dict[str, int]:
        """What the rule says of requests, all of them asked at once."""
        seats = [self._seat(name) for name in guided]
        masks = np.array(
            [
                (_below(p.max_loops + 1) - _below(p.min_loops))
                & (seat.seen if seat.tokens >= KNOWN else -1)
                for seat, p in zip(seats, guided.values(), strict=True)
            ]
        )
        who, bit = np.nonzero((masks[:, None] >> self._bits) % 2)
        loop, kind = np.divmod(bit, KINDS)
        numbers = np.array([seat.number for seat in seats])[who]
        yes = self.rule.drafts(numbers, loop + 1, np.array([0.0, *CLASSES])[kind])
        bits = np.zeros(len(seats), np.int64)
        np.bitwise_or.at(bits, who[yes], 1 << bit[yes])
        return dict(zip(guided, bits.tolist(), strict=True))

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
