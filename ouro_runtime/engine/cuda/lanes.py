"""What a step keeps on the device: the lanes' state, and what is carried between steps.

Every buffer is allocated once, so that a captured graph finds it where it was. A *lane* is a
request's last row of the step: the newest token's position of a decoding request, or the last
position of a prompt chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch

STOPS = 8
"""End tokens of a request that the device watches for. A token after one that it does not watch
for is computed in vain, and dropped by the scheduler."""


class LaneBuffers:
    """Device state of the lanes of a step; the first R entries are in use.

    Args:
        rows: most rows of a pass. lanes: most lanes. slots: request slots. loops: T.
        hidden: H. dtype: of hidden states. drafts: a request may have T positions in flight.

    Attributes:
        drafts: what only steps with drafts use; None without.
    """

    def __init__(
        self,
        rows: int,
        lanes: int,
        slots: int,
        loops: int,
        hidden: int,
        dtype: torch.dtype,
        device: torch.device | str,
        drafts: bool = False,
    ) -> None:
        def ints(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        def longs(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int64, device=device)

        def floats(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.float32, device=device)

        def flags(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.bool, device=device)

        rows = max(rows, lanes)
        # Rows of a pass, in the order of the batch. With one row per request, row i is lane i.
        self.hidden = torch.zeros(rows, hidden, dtype=dtype, device=device)
        self.row_positions, self.row_slots = longs(rows), longs(rows)
        # Lanes. `request` is the request slot, `deepest` the last loop, from 1, of the position.
        self.lane_hidden = torch.zeros(lanes, hidden, dtype=dtype, device=device)
        self.positions, self.slots, self.limit, self.tokens = (longs(lanes) for _ in range(4))
        self.request, self.seed = (longs(lanes) for _ in range(2))
        self.loop, self.depth, self.low, self.high = (ints(lanes) for _ in range(4))
        self.seq_lens, self.fill_copies, self.deepest = (ints(lanes) for _ in range(3))
        self.stops = ints(lanes, STOPS)
        self.survival, self.threshold, self.temperature = (floats(lanes) for _ in range(3))
        self.active, self.run_all, self.finished, self.decoding = (flags(lanes) for _ in range(4))
        self.history = floats(lanes, loops)  # survival after each loop of the token at hand
        self.exit_mask, self.read_mask = flags(lanes), flags(lanes)
        # Carried from step to step, by request slot; the last one is for lanes that only pad. With
        # drafts T times over: the k-th time for the k-th position after the oldest in flight.
        places = (slots + 1) * (loops if drafts else 1)
        self.carried_hidden = torch.zeros(places, hidden, dtype=dtype, device=device)
        self.carried_loop, self.carried_survival = ints(places), floats(places)
        self.carried_history = floats(places, loops)
        self.drafts = DraftBuffers(lanes, places, loops, device) if drafts else None
        # The step's: what the host said of it, the number of the pass at hand, what it brought.
        self.params = ints(LaneParams.rows(loops) * lanes)
        self.step = longs(1)
        self.record = StepRecord.empty(lanes, loops, self.device)
        self.numbers = torch.arange(lanes, dtype=torch.int64, device=device)

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def packed(self, lanes: int) -> torch.Tensor:
        """Where the packed `LaneParams` of `lanes` lanes lie."""
        rows = LaneParams.rows(self.record.tokens.shape[1])
        return self.params[: rows * lanes].view(rows, lanes)


class DraftBuffers:
    """What only steps with drafts use: of lanes, of what is carried, and of the record.

    A drafted request has T lanes: `place` k of it begins a step k positions after the oldest one
    in flight, and position p + 1 is started by `before`, the lane of p.

    Args:
        lanes: most lanes. places: of what is carried. loops: T.
    """

    def __init__(self, lanes: int, places: int, loops: int, device: torch.device | str) -> None:
        def ints(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        def longs(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int64, device=device)

        def flags(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.bool, device=device)

        self.params = ints(len(DRAFT_COLUMNS) * lanes)
        # Of lanes, see `DraftLayout`; `row` twice, as kernels and as indexing take it. `draft` is
        # the token drafted here, at loop `drafted`; 0 if none was.
        self.row, self.rows = ints(lanes), longs(lanes)
        self.before, self.place = longs(lanes), longs(lanes)
        self.on, self.again, self.rule = flags(lanes), flags(lanes), longs(lanes)
        self.drafted, self.draft = ints(lanes), longs(lanes)
        self.carried_alive = flags(places)
        self.carried_drafted, self.carried_draft = ints(places), longs(places)
        # The record, by request. By token: the loop it was drafted at; drafts, and cells, of later
        # positions dropped with it. By loop: cells run. See `Flight` for the last.
        self.made, self.dropped, self.waste, self.cells = (ints(lanes, loops) for _ in "1234")
        self.flight = ints(lanes, FLIGHT)

    def packed(self, lanes: int) -> torch.Tensor:
        """Where the packed `DraftLayout` of `lanes` lanes lies."""
        return self.params[: len(DRAFT_COLUMNS) * lanes].view(-1, lanes)


DRAFT_COLUMNS = ("row", "before", "place", "on", "again", "rule")
FLIGHT = 4


@dataclass
class LaneParams:
    """Per-lane numbers that the host knows, as columns of one array: one copy to the device.

    Attributes:
        threshold: [R] float32. limit: [R], first position that may not be entered.
        run_all: [R] bool, the position runs every loop: a prompt's, and all in mode `exact`.
        deepest: [R], the last of them, from 1: that a request can read K/V of.
        once: [R] bool, the lane stops when it leaves. decoding: [R] bool, see `LaneBook.plan`.
        slot: [R], request slots. temperature: [R] float32 and seed: [R] int64, of the sampler.
        stops: [R, STOPS] end tokens, padded with -1.
        low, high: [T, R], see `LanePlan`.
    """

    threshold: np.ndarray
    limit: np.ndarray
    run_all: np.ndarray
    once: np.ndarray
    decoding: np.ndarray
    slot: np.ndarray
    deepest: np.ndarray
    temperature: np.ndarray
    seed: np.ndarray
    stops: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @staticmethod
    def rows(loops: int) -> int:
        """Rows of the packed array."""
        return 10 + STOPS + 2 * loops

    def pack(self, width: int, spare: int) -> np.ndarray:
        """[rows(T), width] int32; floats keep their bits. Lanes past R pad: slot `spare`, all else
        0, so that no position may be entered."""
        lanes = len(self.slot)
        packed = np.zeros((self.rows(len(self.low)), width), np.int32)
        packed[5, lanes:] = spare
        use = packed[:, :lanes]
        use[0] = self.threshold.astype(np.float32).view(np.int32)
        use[1], use[2], use[3], use[4] = self.limit, self.run_all, self.once, self.decoding
        use[5] = self.slot
        use[6] = self.temperature.astype(np.float32).view(np.int32)
        use[7:9] = self.seed.astype(np.int64).view(np.int32).reshape(lanes, 2).T
        use[9] = self.deepest
        use[10 : 10 + STOPS] = self.stops.T
        rest = use[10 + STOPS :]
        rest[: len(self.low)], rest[len(self.low) :] = self.low, self.high
        return packed

    @staticmethod
    def unpack(packed: torch.Tensor) -> dict[str, torch.Tensor]:
        """The columns of a packed array on the device, by name; numbers and flags are int32."""
        low, high = LaneParams.limits(packed)
        return {
            "threshold": packed[0].view(torch.float32),
            "limit": packed[1],
            "run_all": packed[2],
            "once": packed[3],
            "decoding": packed[4],
            "slot": packed[5],
            "temperature": packed[6].view(torch.float32),
            "seed": torch.stack([packed[7], packed[8]], 1).view(torch.int64).view(-1),
            "deepest": packed[9],
            "stops": packed[10 : 10 + STOPS].t(),
            "low": low,
            "high": high,
        }

    @staticmethod
    def limits(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`low` and `high` of a packed array."""
        rest = packed[10 + STOPS :]
        return rest[: len(rest) // 2], rest[len(rest) // 2 :]


@dataclass
class StepRecord:
    """What a step brought, on the device.

    Attributes:
        tokens: [R, T] int64, the tokens of each request in order; entries past `count` are 0.
        depths: [R, T] int32, the loop each was read out at. count: [R] int32.
        start, end: [R] int32, loops each lane had done before and after the step.
        rejected: [R] int32, what vLLM takes for rejected drafts: 1 - `count` where decoding.
        history: [R, T, T] float32, entry [r, p, n]: S(n + 1) of lane r's token, as of pass p; means
            something up to the loop of that pass, and where somebody was read out after it.
    """

    tokens: torch.Tensor
    depths: torch.Tensor
    count: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor
    rejected: torch.Tensor
    history: torch.Tensor

    @classmethod
    def empty(cls, lanes: int, loops: int, device: torch.device) -> StepRecord:
        def ints(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        tokens = torch.zeros(lanes, loops, dtype=torch.int64, device=device)
        history = torch.ones(lanes, loops, loops, dtype=torch.float32, device=device)
        count, start, end, rejected = (ints(lanes) for _ in range(4))
        return cls(tokens, ints(lanes, loops), count, start, end, rejected, history)

    def first(self, lanes: int) -> StepRecord:
        """The part of the first `lanes` lanes, in the same memory."""
        return StepRecord(*(getattr(self, field.name)[:lanes] for field in fields(self)))

    def add(
        self, lanes: torch.Tensor, read: torch.Tensor, tokens: torch.Tensor, depths: torch.Tensor
    ) -> torch.Tensor:
        """Append a token to each of `lanes` [M] int64 that was `read` [M]; their places [M]."""
        loops = self.tokens.shape[1]
        place = lanes * loops + self.count[lanes].clamp_max(loops - 1)
        for store, new in ((self.tokens.view(-1), tokens), (self.depths.view(-1), depths)):
            store[place] = torch.where(read, new.to(store.dtype), store[place])
        self.count.index_add_(0, lanes, read.to(torch.int32))
        return place

    def packed(self) -> torch.Tensor:
        """[R, T + 2 + T * T] int32: depths, start, end, and the bits of `history`; what the host's
        bookkeeping needs beside tokens. Memory of its own."""
        history = self.history.flatten(1).view(torch.int32)
        return torch.cat([self.depths, self.start[:, None], self.end[:, None], history], dim=1)
