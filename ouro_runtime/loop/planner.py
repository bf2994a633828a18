"""Which cells run next: plain numpy, no torch, no vLLM.

A step is up to T passes over a flat set of rows. A row is a position of a request on its way down
its column of cells. Rows are of two kinds:

- a *head* is the newest token's position: when its exit rule fires it is read out, and its token's
  position may enter the next pass as a new head;
- any other row only runs until it has done `stop` loops: prompt positions (T), positions being
  recomputed after a preemption (the depth they left at), and in `exact` mode positions that were
  read out and still owe their deeper loops.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np


@dataclass
class Carried:
    """A row left unfinished at the end of a step.

    Attributes:
        position: of the token; loop: loops done; head: not read out yet.
        history: [T] float32, S(1)..S(loop), then anything.
        hidden: the state that enters the next loop (opaque here).
    """

    position: int
    loop: int
    history: np.ndarray
    head: bool
    hidden: Any = None


@dataclass
class Work:
    """What one request brings into a step.

    Attributes:
        start, count: positions `start .. start + count - 1` are scheduled.
        known: tokens known so far; position `known - 1` is the head's.
        prompt: tokens of the original prompt.
        last: the last position that may be read out (token and length limits).
        threshold, min_loops, max_loops: exit controls; `forced`, if any, [F] depths by token.
        exact: K/V mode `exact`, else `skip`.
        single: at most one token in this step, sampled after it (a grammar needs the host).
        depths: depth of each token read out so far, for the replay of a preempted request.
        carried: rows left over from the step before.
    """

    start: int
    count: int
    known: int
    prompt: int
    last: int
    threshold: float = 1.0
    min_loops: int = 1
    max_loops: int = 1
    forced: np.ndarray | None = None
    exact: bool = False
    single: bool = False
    depths: list[int] = field(default_factory=list)
    carried: list[Carried] = field(default_factory=list)


@dataclass
class Rows:
    """Rows of the next pass, structure of arrays, all [N]; order is the order of hidden states."""

    req: np.ndarray  # int64, index of the request in the step
    pos: np.ndarray  # int64
    loop: np.ndarray  # int64, loops done: also the 0-based loop that runs next
    stop: np.ndarray  # int64, loops after which a row that is no head is done
    head: np.ndarray  # bool
    survival: np.ndarray  # float32, S(loop)
    history: np.ndarray  # [N, T] float32, S(1)..S(loop) of a head, then anything

    def __len__(self) -> int:
        return len(self.req)

    def take(self, index: np.ndarray) -> Rows:
        """The rows at `index` (integer or boolean)."""
        return Rows(*(getattr(self, name)[index] for name in ROW_FIELDS))

    def append(self, other: Rows) -> Rows:
        """These rows, then the other ones."""
        pairs = ((getattr(self, name), getattr(other, name)) for name in ROW_FIELDS)
        return Rows(*(np.concatenate(pair) for pair in pairs))


ROW_FIELDS = ("req", "pos", "loop", "stop", "head", "survival", "history")


@dataclass
class Segments:
    """Rows of a pass as sequences for a paged-attention call: runs of rows of one request and loop
    at consecutive positions.

    Attributes:
        first: [S + 1] int32, row at which each sequence starts, and the number of rows.
        req, loop: [S] int64. seq_len: [S] int32, positions each sequence's last row may read.
        max_query: rows of the longest sequence.
    """

    first: np.ndarray
    req: np.ndarray
    loop: np.ndarray
    seq_len: np.ndarray
    max_query: int


@dataclass
class Readout:
    """Heads read out after a pass.

    Attributes:
        rows: [M] int64, their rows. req, depth: [M] int64.
        deferred: [M] bool, sampled after the step, not now.
        cdf: [M, T] float32, the gate's CDF(1)..CDF(depth), then zeros. CDF(T) is 1.
    """

    rows: np.ndarray
    req: np.ndarray
    depth: np.ndarray
    deferred: np.ndarray
    cdf: np.ndarray


@dataclass
class Move:
    """How rows change between two passes.

    Attributes:
        fill: rows (before the change) whose K/V must stand in for their deeper loops.
        reuse, append: indices into the sampled tokens: their successors take the place of the row
            that was read out, or come after all rows.
        reuse_rows: rows taken by the successors of `reuse`.
        keep: rows that stay, None if all do (applied after reuse, before append).
        done: rows that finished their last loop.
    """

    fill: np.ndarray
    reuse: np.ndarray
    reuse_rows: np.ndarray
    append: np.ndarray
    keep: np.ndarray | None
    done: np.ndarray

    @property
    def nothing(self) -> bool:
        """Every row only goes on to its next loop."""
        return self is STAY


NONE = np.zeros(0, np.int64)
STAY = Move(NONE, NONE, NONE, NONE, None, NONE)


class StepPlan:
    """The rows of one engine step, pass by pass.

    Per pass: read `rows` and `segments()`, run the block, update `rows.survival`, then
    `readout(mask)`, sample, and `advance(...)`.

    Args:
        work: one entry per request of the step; its order gives the request indices.
        loops: T.
    """

    def __init__(self, work: list[Work], loops: int) -> None:
        self.loops = loops
        self.passes_left = loops
        self.work = work
        self.threshold = np.array([w.threshold for w in work], np.float32)
        self._prompt = np.array([w.prompt for w in work], np.int64)
        self._last = np.array([w.last for w in work], np.int64)
        self._exact = np.array([w.exact for w in work], bool)
        self._single = np.array([w.single for w in work], bool)
        self._min = np.array([w.min_loops for w in work], np.int64)
        self._max = np.array([w.max_loops for w in work], np.int64)
        self._forced_len = np.array([0 if w.forced is None else len(w.forced) for w in work])
        self._forced = np.zeros((len(work), max(1, int(self._forced_len.max()))), np.int64)
        for index, w in enumerate(work):
            if w.forced is not None:
                self._forced[index, : len(w.forced)] = w.forced
        self.rows = self._first_rows(work)
        self.scheduled = int(sum(w.count for w in work))
        self._segments: Segments | None = None

    def _first_rows(self, work: list[Work]) -> Rows:
        """Scheduled positions in request order, then the deeper rows carried over."""
        count = np.array([w.count for w in work], np.int64)
        start = np.array([w.start for w in work], np.int64)
        known = np.array([w.known for w in work], np.int64)
        req = np.repeat(np.arange(len(work)), count)
        offset = np.arange(len(req)) - np.repeat(np.cumsum(count) - count, count)
        pos = start[req] + offset
        rows = self._new_rows(req, pos, np.zeros(len(req), np.int64), pos == known[req] - 1)
        self.restore: list[tuple[int, Carried]] = []
        first = np.cumsum(count) - count
        deep: list[tuple[int, Carried]] = []
        for index, w in enumerate(work):
            self._replay(rows, w, int(first[index]))
            for carried in w.carried:
                if not carried.head:
                    deep.append((index, carried))
                    continue
                assert carried.position == w.start and w.count == 1, "a carried head moved"
                row = int(first[index])
                rows.loop[row] = carried.loop
                rows.survival[row] = carried.history[carried.loop - 1]
                rows.history[row] = carried.history
                self.restore.append((row, carried))
        if deep:
            self.restore += [(len(rows) + i, c) for i, (_, c) in enumerate(deep)]
            rows = rows.append(
                self._new_rows(
                    req=np.array([index for index, _ in deep], np.int64),
                    pos=np.array([c.position for _, c in deep], np.int64),
                    loop=np.array([c.loop for _, c in deep], np.int64),
                    head=np.zeros(len(deep), bool),
                )
            )
        return rows

    def _replay(self, rows: Rows, w: Work, first: int) -> None:
        """Positions of generated tokens that are computed again stop where they left before."""
        if w.exact or w.start + w.count <= w.prompt or w.start >= w.known - 1:
            return
        for position in range(max(w.start, w.prompt), min(w.start + w.count, w.known - 1)):
            rows.stop[first + position - w.start] = w.depths[position - w.prompt + 1]

    def limits(self) -> tuple[np.ndarray, np.ndarray]:
        """(min, max) loops [N] int64 of each row's token; only heads' entries mean something."""
        low, high = self._min[self.rows.req], self._max[self.rows.req]
        if self._forced_len.any():
            req = self.rows.req
            length = self._forced_len[req]
            token = np.maximum(self.rows.pos - self._prompt[req] + 1, 0)
            depth = self._forced[req, token % np.maximum(length, 1)]
            low, high = (np.where(length > 0, depth, bound) for bound in (low, high))
        return low, high

    def segments(self) -> Segments:
        """The sequences of the next pass."""
        if self._segments is None:
            self._segments = self._find_segments()
        return self._segments

    def _find_segments(self) -> Segments:
        rows = self.rows
        n = len(rows)
        if n == 1 or (rows.req[1:] != rows.req[:-1]).all():
            return Segments(
                first=np.arange(n + 1, dtype=np.int32),
                req=rows.req,
                loop=rows.loop.copy(),
                seq_len=(rows.pos + 1).astype(np.int32),
                max_query=1,
            )
        starts = np.ones(n, bool)
        starts[1:] = (
            (rows.req[1:] != rows.req[:-1])
            | (rows.loop[1:] != rows.loop[:-1])
            | (rows.pos[1:] != rows.pos[:-1] + 1)
        )
        begin = np.nonzero(starts)[0]
        first = np.append(begin, n).astype(np.int32)
        last = first[1:] - 1
        return Segments(
            first=first,
            req=rows.req[begin],
            loop=rows.loop[begin],
            seq_len=(rows.pos[last] + 1).astype(np.int32),
            max_query=int((first[1:] - first[:-1]).max()),
        )

    def readout(self, exits: np.ndarray) -> Readout:
        """Count the loop just run and name the heads that leave.

        Args:
            exits: [N] bool, the exit rule's answer for every row (ignored where not a head).
        """
        every = self.rows
        every.history[np.arange(len(every)), every.loop] = every.survival
        every.loop += 1
        rows = np.nonzero(exits & every.head)[0]
        if not len(rows):
            return Readout(
                rows, NONE, NONE, np.zeros(0, bool), np.zeros((0, self.loops), np.float32)
            )
        req, depth = every.req[rows], every.loop[rows]
        return Readout(rows, req, depth, self._single[req], self._cdf(every.history[rows], depth))

    def _cdf(self, survival: np.ndarray, depth: np.ndarray) -> np.ndarray:
        """CDF(1)..CDF(depth), then zeros, from S(1)..S(depth); [M, T] and [M]."""
        cdf = 1.0 - survival
        # What the gate leaves over exits at the last loop, so its own last value says nothing.
        cdf[:, -1] = 1.0
        cdf[np.arange(self.loops) >= depth[:, None]] = 0.0
        return cdf

    def runs_every_loop(self, out: Readout) -> np.ndarray:
        """[M] bool: positions read out that run all T loops: the prompt's, and all in `exact`."""
        return self._exact[out.req] | self._is_tail(out)

    def _is_tail(self, out: Readout) -> np.ndarray:
        return self.rows.pos[out.rows] == self._prompt[out.req] - 1

    def advance(self, out: Readout, finished: np.ndarray) -> Move:
        """Rows of the next pass.

        Args:
            out: what `readout` returned. finished: [M] bool, the request ended with this token.
        """
        self.passes_left -= 1
        rows, loops = self.rows, self.loops
        if not len(out.rows) and not (~rows.head & (rows.loop >= rows.stop)).any():
            self._segments = replace(self.segments(), loop=self.segments().loop + 1)
            return STAY
        self._segments = None
        tail = self._is_tail(out)
        exact = self._exact[out.req]
        unfinished_column = out.depth < loops
        stays = unfinished_column & (tail | (exact & ~finished))
        more = ~finished & ~out.deferred & (rows.pos[out.rows] < self._last[out.req])
        starts = more & (self.passes_left > 0)

        rows.head[out.rows] = False
        rows.stop[out.rows] = np.where(stays, loops, out.depth)
        ended = ~rows.head & (rows.loop >= rows.stop)
        stands_in = ended & (rows.loop < loops)
        stands_in[out.rows] &= ~finished & ~exact
        fill = np.nonzero(stands_in)[0]
        done = np.nonzero(ended)[0]

        reuse = np.nonzero(starts & ~stays)[0]
        append = np.nonzero(starts & stays)[0]
        reuse_rows = out.rows[reuse]
        if len(append):
            req, pos = out.req[append], rows.pos[out.rows[append]] + 1
            born = self._new_rows(req, pos, np.zeros(len(req), np.int64), np.ones(len(req), bool))
        rows.pos[reuse_rows] += 1
        rows.loop[reuse_rows] = 0
        rows.head[reuse_rows] = True
        rows.survival[reuse_rows] = 1.0
        rows.stop[reuse_rows] = loops
        ended[reuse_rows] = False

        ends = out.req[finished & exact & ~tail]
        if len(ends):
            ended |= np.isin(rows.req, ends) & (rows.pos >= self._prompt[rows.req])
        keep = np.nonzero(~ended)[0] if ended.any() else None
        if keep is not None:
            self.rows = rows.take(keep)
        if len(append):
            self.rows = self.rows.append(born)
        return Move(fill, reuse, reuse_rows, append, keep, done)

    def _new_rows(
        self, req: np.ndarray, pos: np.ndarray, loop: np.ndarray, head: np.ndarray
    ) -> Rows:
        """Rows [M] that may run every loop, their survival not known yet."""
        return Rows(
            req=req,
            pos=pos,
            loop=loop,
            stop=np.full(len(req), self.loops, np.int64),
            head=head,
            survival=np.ones(len(req), np.float32),
            history=np.ones((len(req), self.loops), np.float32),
        )

    def leftovers(self) -> list[tuple[int, int, Carried]]:
        """(row, request, state) of every row to be carried over; hidden states are the caller's."""
        rows = self.rows
        return [
            (
                row,
                int(rows.req[row]),
                Carried(
                    int(rows.pos[row]),
                    int(rows.loop[row]),
                    rows.history[row].copy(),
                    bool(rows.head[row]),
                ),
            )
            for row in range(len(rows))
        ]
