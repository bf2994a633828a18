"""What a step keeps on the device: the lanes' state, and what is carried between steps.

Every buffer is allocated once, so that a captured graph finds it where it was. A *lane* is a
request's last row of the step: the newest token's position of a decoding request, or the last
position of a prompt chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

STOPS = 8
"""End tokens of a request that the device watches for. A token after one that it does not watch
for is computed in vain, and dropped by the scheduler."""


class LaneBuffers:
    """Device state of the lanes of a step; the first R entries are in use.

    Args:
        rows: most rows of a pass. lanes: most lanes. slots: request slots. loops: T.
        hidden: H. dtype: of hidden states.
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
    ) -> None:
        def ints(size: int) -> torch.Tensor:
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
        # Lanes.
        self.lane_hidden = torch.zeros(lanes, hidden, dtype=dtype, device=device)
        self.positions, self.slots, self.limit, self.tokens = (longs(lanes) for _ in range(4))
        self.loop, self.depth, self.low, self.high = (ints(lanes) for _ in range(4))
        self.seq_lens, self.fill_copies = ints(lanes), ints(lanes)
        self.survival, self.threshold = floats(lanes), floats(lanes)
        self.active, self.run_all, self.finished = (flags(lanes) for _ in range(3))
        self.history = floats(lanes, loops)  # survival after each loop of the token at hand
        self.exit_mask, self.read_mask = flags(lanes), flags(lanes)
        # Carried from step to step, by request slot.
        self.carried_hidden = torch.zeros(slots, hidden, dtype=dtype, device=device)
        self.carried_loop, self.carried_survival = ints(slots), floats(slots)
        self.carried_history = floats(slots, loops)
        self.numbers = torch.arange(lanes, dtype=torch.int64, device=device)

    @property
    def device(self) -> torch.device:
        return self.hidden.device


@dataclass
class LaneParams:
    """Per-lane numbers that the host knows, as columns of one array: one copy to the device.

    Attributes:
        threshold: [R] float32. limit: [R], first position that may not be entered.
        run_all: [R] bool, the position runs every loop: a prompt's, and all in mode `exact`.
        once: [R] bool, the lane stops when it leaves. decoding: [R] bool, see `LaneBook.plan`.
        stops: [R, STOPS] end tokens, padded with -1.
        low, high: [T or 1, R], see `LanePlan`.
    """

    threshold: np.ndarray
    limit: np.ndarray
    run_all: np.ndarray
    once: np.ndarray
    decoding: np.ndarray
    stops: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def pack(self) -> np.ndarray:
        """[5 + STOPS + 2 T, R] int32; thresholds keep their bits."""
        head = [self.limit, self.run_all, self.once, self.decoding]
        return np.concatenate(
            [
                self.threshold.astype(np.float32).view(np.int32)[None],
                np.stack(head).astype(np.int32),
                self.stops.T.astype(np.int32),
                self.low.astype(np.int32),
                self.high.astype(np.int32),
            ]
        )

    @staticmethod
    def unpack(packed: torch.Tensor) -> dict[str, torch.Tensor]:
        """The columns of a packed array on the device, by name."""
        rest = packed[5 + STOPS :]
        half = len(rest) // 2
        return {
            "threshold": packed[0].view(torch.float32),
            "limit": packed[1].long(),
            "run_all": packed[2].bool(),
            "once": packed[3].bool(),
            "decoding": packed[4].bool(),
            "stops": packed[5 : 5 + STOPS].t(),
            "low": rest[:half],
            "high": rest[half:],
        }


@dataclass
class StepRecord:
    """What a step brought, on the device.

    Attributes:
        tokens: [R, T] int64, the tokens of each request in order; entries past `count` are 0.
        depths: [R, T] int32, the loop each was read out at. count: [R] int32.
        start, end: [R] int32, loops each lane had done before and after the step.
        history: [R, T, T] float32, entry [r, p, n]: S(n + 1) of lane r's token, as of pass p; means
            something up to the loop of that pass, and where somebody was read out after it.
    """

    tokens: torch.Tensor
    depths: torch.Tensor
    count: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor
    history: torch.Tensor

    @classmethod
    def empty(cls, lanes: int, loops: int, device: torch.device) -> StepRecord:
        def ints(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        tokens = torch.zeros(lanes, loops, dtype=torch.int64, device=device)
        history = torch.ones(lanes, loops, loops, dtype=torch.float32, device=device)
        return cls(tokens, ints(lanes, loops), ints(lanes), ints(lanes), ints(lanes), history)

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
        bookkeeping needs beside tokens."""
        history = self.history.flatten(1).view(torch.int32)
        return torch.cat([self.depths, self.start[:, None], self.end[:, None], history], dim=1)
