"""Which lanes a step with drafts has, as the host lays them out. Plain numpy."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ouro_runtime.engine.cuda.lanes import DRAFT_COLUMNS, LaneParams


@dataclass
class DraftLayout:
    """The L lanes of a step of R requests: a first lane each, then T - 1 more of each that is
    drafted.

    Attributes:
        row: [L], the lane's request in the batch. place: [L], how many positions after the oldest
            in flight it begins. before: [L], the lane of the position before; its own number where
            `on` [L] bool, the request is drafted, is false.
        again: [L] bool, the request was drafted in its last step, too: what is carried is in
            flight. rule: [L], see `draft_pieces.choose`.
    """

    row: np.ndarray
    before: np.ndarray
    place: np.ndarray
    on: np.ndarray
    again: np.ndarray
    rule: np.ndarray

    @classmethod
    def of(
        cls, drafted: np.ndarray, again: np.ndarray, rule: np.ndarray, loops: int
    ) -> DraftLayout:
        """Of R requests, all [R]: `drafted` bool; `again` bool and `rule` as above."""
        requests, chosen = len(drafted), np.nonzero(drafted)[0]
        further = requests + np.arange(len(chosen) * (loops - 1)).reshape(len(chosen), -1)
        lanes = np.concatenate([chosen[:, None], further], axis=1)
        row = np.concatenate([np.arange(requests), np.repeat(chosen, loops - 1)])
        before, place = np.arange(len(row)), np.zeros(len(row), np.int64)
        before[lanes] = np.roll(lanes, 1, axis=1)
        place[lanes] = np.arange(loops)
        return cls(row, before, place, drafted[row], again[row], rule[row])

    def __len__(self) -> int:
        return len(self.row)

    def pack(self, width: int) -> np.ndarray:
        """[columns, width] int32; lanes past L pad, and are nobody's."""
        packed = np.zeros((len(DRAFT_COLUMNS), width), np.int32)
        packed[1] = np.arange(width)
        for column, name in zip(packed, DRAFT_COLUMNS, strict=True):
            column[: len(self)] = getattr(self, name)
        return packed

    def spread(self, params: LaneParams, asks: DraftAsks, spare: int) -> LaneParams:
        """The lanes' parameters.

        Args:
            params: of the R requests. asks: what each asks for where it is drafted.
            spare: the request slot of lanes that only pad.
        """
        row, on, further = self.row, self.on, self.place > 0
        by_lane = {
            name: value[:, row] if name in ("low", "high") else value[row]
            for name, value in vars(params).items()
        }
        wide = LaneParams(**by_lane)
        return replace(
            wide,
            threshold=np.where(on, asks.threshold[row], wide.threshold),
            low=np.where(on, asks.low[row], wide.low),
            high=np.where(on, asks.high[row], wide.high),
            once=wide.once & ~on,
            decoding=np.where(further, self.again, wide.decoding),
            slot=wide.slot + self.place * (spare + 1),
        )


@dataclass
class DraftAsks:
    """The exit rule of drafts, [R] each (or by request slot)."""

    threshold: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def __getitem__(self, at: np.ndarray) -> DraftAsks:
        return DraftAsks(self.threshold[at], self.low[at], self.high[at])
