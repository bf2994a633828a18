"""Lanes: what the host knows of a step's read-outs before the step runs. Plain numpy, no torch.

Where nothing may be read back between two passes, a request keeps one row (its *lane*) for the
whole step, and the device alone decides when a lane leaves. The host still has to choose, before
the step, after which passes anybody is sampled, and whom. `LaneBook` answers with a superset that
is exact for every request whose depths do not depend on the gate: it follows, per request, the set
of loops that the lane may have behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ouro_runtime.config import GATE, LOSSLESS, ExitParams
from ouro_runtime.loop.limits import forced_place


@dataclass
class LanePlan:
    """A step of R lanes and T passes, as far as the host can know it.

    Attributes:
        candidates: per pass, the lanes [M] int64 that may be read out after it, ascending.
        low, high: [T, R] int32, least and most loops of the token at hand in each pass.
    """

    candidates: list[np.ndarray]
    low: np.ndarray
    high: np.ndarray


class LaneBook:
    """Depth controls by request slot, and the loops each slot's lane may have behind it.

    Args:
        slots: number of request slots. loops: T.
    """

    def __init__(self, slots: int, loops: int) -> None:
        self.loops = loops
        self.low = np.ones(slots, np.int32)
        self.high = np.full(slots, loops, np.int32)
        self.threshold = np.ones(slots, np.float32)
        self.exact = np.zeros(slots, bool)  # every position runs every loop
        self.lossless = np.zeros(slots, bool)
        self.single = np.zeros(slots, bool)
        self._phases = np.ones(slots, np.int64)  # bit n: n loops may be done
        self._token = np.zeros(slots, np.int64)
        self._forced_len = np.zeros(slots, np.int64)
        self._forced = np.zeros((slots, 1), np.int32)
        # _reach[n]: the bits n .. T.
        bits = 1 << np.arange(loops + 2, dtype=np.int64)
        self._reach = np.array([bits[n : loops + 1].sum() for n in range(loops + 2)], np.int64)

    def add(self, slot: int, params: ExitParams, token: int, single: bool) -> None:
        """A request takes `slot`, to be filled in from its first position.

        Args:
            token: index of the first token it will bring: the number it has already (a request
                that was preempted).
            single: at most one token in a step.

        A lossless request is planned as one of full depth; what its drafts do, the device says.
        """
        self.lossless[slot] = params.exit_mode == LOSSLESS
        self.exact[slot] = params.exit_mode == "exact" or self.lossless[slot]
        if self.lossless[slot]:
            params = ExitParams(1.0, 1, self.loops, LOSSLESS)
        forced = params.forced_depths
        self.low[slot], self.high[slot] = params.min_loops, params.max_loops
        self.threshold[slot] = params.threshold_of(GATE)
        self.single[slot] = single
        self._phases[slot] = 1
        self._token[slot] = token
        self._forced_len[slot] = len(forced)
        if len(forced) > self._forced.shape[1]:
            wider = np.zeros((len(self._forced), len(forced)), np.int32)
            wider[:, : self._forced.shape[1]] = self._forced
            self._forced = wider
        self._forced[slot, : len(forced)] = forced

    def drafted(self, slots: np.ndarray) -> None:
        """Requests in `slots` may be left with any number of loops behind their oldest position in
        flight: the step at hand drafts them."""
        self._phases[slots] = self._reach[0] & ~self._reach[self.loops]

    def plan(self, slots: np.ndarray, decoding: np.ndarray, heads: np.ndarray) -> LanePlan:
        """Plan a step, and note what lanes may be left with.

        Args:
            slots: [R] integer, the slot of each lane.
            decoding: [R] bool; the others' positions are being filled in, from loop 1 to T.
            heads: [R] bool: the lane's position is read out when its rule fires. True where
                `decoding`, and for the last chunk of a prompt.
        """
        phases = np.where(decoding, self._phases[slots], 1)
        # These bring one token and start no other in the same step.
        once = ~decoding | self.single[slots] | self.exact[slots]
        gated = self.threshold[slots] < 1.0
        forced = self._forced_len[slots]
        moving = forced.any()
        token = self._token[slots]
        low, high = self.low[slots], self.high[slots]
        lows, highs, candidates = [], [], []
        for _ in range(self.loops):
            if moving:
                depth = self._forced[slots, forced_place(token, forced)]
                low = np.where(forced > 0, depth, low)
                high = np.where(forced > 0, depth, high)
            lows.append(low)
            highs.append(high)
            phases = phases << 1
            must = self._reach[high]
            leaves = (phases & np.where(gated, self._reach[np.minimum(low, high)], must)) != 0
            candidates.append(np.nonzero(leaves & heads)[0])
            token = token + (leaves & heads & (forced > 0))
            phases = (phases & ~must) | (leaves & ~once)
        phases = np.where(once, 1, phases)
        self._phases[slots] = phases
        self._token[slots] = token
        return LanePlan(
            candidates=candidates,
            low=np.stack(lows).astype(np.int32),
            high=np.stack(highs).astype(np.int32),
        )
