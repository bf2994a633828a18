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

from dataclasses import replace

import numpy as np

from ouro_runtime.exit.cdf import exit_cdf
from ouro_runtime.loop.limits import forced_place, replayed
from ouro_runtime.loop.rows import (
    HEAD,
    NOBODY,
    NONE,
    STAY,
    Carried,
    Left,
    Move,
    Readout,
    Rows,
    Segments,
    Work,
)


class StepPlan:
    """The rows of one engine step, pass by pass.

    Per pass: read `rows` and `segments()`, run the block, update `rows.survival`, then
    `readout(mask)`, sample, and `advance(...)`. Between two passes over a model's weights every
    line of this file is cold: what a pass does is counted in numpy calls.

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
        self._known = np.array([w.known for w in work], np.int64)
        self._low, self._high = self._limits(work)
        self.rows = self._first_rows(work)
        self.scheduled = int(sum(w.count for w in work))
        self._segments: Segments | None = None

    def _first_rows(self, work: list[Work]) -> Rows:
        """Scheduled positions in request order, then the deeper rows carried over."""
        count = np.array([w.count for w in work], np.int64)
        start = np.array([w.start for w in work], np.int64)
        req = np.repeat(np.arange(len(work)), count)
        offset = np.arange(len(req)) - np.repeat(np.cumsum(count) - count, count)
        pos = start[req] + offset
        rows = self._new_rows(req, pos)
        rows.stop[pos == self._known[req] - 1] = HEAD
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
                )
            )
        return rows

    def _replay(self, rows: Rows, w: Work, first: int) -> None:
        """Positions of generated tokens that are computed again stop where they left before."""
        if w.exact or w.start + w.count <= w.prompt or w.start >= w.known - 1:
            return
        offset, depths = replayed(w.depths, w.prompt, w.start, w.start + w.count, w.known)
        rows.stop[first + offset : first + offset + len(depths)] = depths

    def _limits(self, work: list[Work]) -> tuple[np.ndarray, np.ndarray]:
        """(least, most) loops, both [R, T + 1] int64, of the tokens that a step may read out."""
        ahead = np.arange(self.loops + 1)
        low, high = (
            np.repeat(np.array(limits, np.int64)[:, None], len(ahead), axis=1)
            for limits in ([w.min_loops for w in work], [w.max_loops for w in work])
        )
        for index, w in enumerate(work):
            if w.forced is not None:
                token = w.known - w.prompt + ahead
                low[index] = high[index] = w.forced[forced_place(token, len(w.forced))]
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
        rows = np.nonzero(exits & (every.stop == HEAD))[0]
        if not len(rows):
            cdf = np.zeros((0, self.loops), np.float32)
            return Readout(rows, NONE, NONE, NOBODY, NOBODY, NOBODY, cdf)
        req, depth = every.req[rows], every.loop[rows]
        return Readout(
            rows,
            req,
            depth,
            tail=every.pos[rows] == self._prompt[req] - 1,
            exact=self._exact[req],
            deferred=self._single[req],
            cdf=exit_cdf(every.history[rows], depth),
        )

    def advance(self, out: Readout, finished: np.ndarray) -> Move:
        """Rows of the next pass.

        Args:
            out: what `readout` returned. finished: [M] bool, the request ended with this token;
                it ends at its last position whatever this says.
        """
        self.passes_left -= 1
        over = np.nonzero(self.rows.loop >= self.rows.stop)[0]  # never a head
        if not len(out) and not len(over):
            self._segments = replace(self.segments(), loop=self.segments().loop + 1)
            return STAY
        self._segments = None
        pos = self.rows.pos[out.rows]
        finished = finished | (pos >= self._last[out.req])
        stays, starts = self._fates(out, finished)
        left, done = self._leave(out, pos, over, stays, finished)

        reuse = np.nonzero(starts & ~stays)[0]
        append = np.nonzero(starts & stays)[0]
        reuse_rows = out.rows[reuse]
        self.rows.stop[out.rows] = self.loops  # read out: heads no more
        if len(reuse):
            self._begin(reuse_rows, out.req[reuse], pos[reuse] + 1)
        keep = self._kept(done, reuse_rows, out.req[finished & out.exact & ~out.tail])
        if keep is not None:
            self.rows = self.rows.take(keep)
        if len(append):
            born = self._new_rows(out.req[append], pos[append] + 1)
            born.stop[:] = HEAD
            self.rows = self.rows.append(born)
        return Move(left, reuse, reuse_rows, append, keep, done)

    def _fates(self, out: Readout, finished: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of the rows read out, [M] bool each: those that stay to run their deeper loops, and those
        whose token's position starts in the next pass."""
        stays = (out.depth < self.loops) & (out.tail | (out.exact & ~finished))
        if self.passes_left:
            return stays, ~(finished | out.deferred)
        return stays, np.zeros(len(out), bool)

    def _leave(
        self,
        out: Readout,
        pos: np.ndarray,
        over: np.ndarray,
        stays: np.ndarray,
        finished: np.ndarray,
    ) -> tuple[Left, np.ndarray]:
        """Positions whose loops are over before T, and the rows [D] that are done.

        Args:
            pos: [M], of the rows read out. over: rows that have run all they had to.
            stays: [M] bool, the row goes on. finished: [M] bool, nobody reads the position again.
        """
        owing = np.nonzero((out.depth < self.loops) & ~(stays | finished))[0]
        left = Left(out.req[owing], pos[owing], out.depth[owing])
        done = out.rows[~stays]
        if not len(over):
            return left, done
        rows = self.rows
        replayed = over[rows.loop[over] < self.loops]
        left = Left(
            np.concatenate([left.req, rows.req[replayed]]),
            np.concatenate([left.pos, rows.pos[replayed]]),
            np.concatenate([left.depth, rows.loop[replayed]]),
        )
        return left, np.concatenate([done, over])

    def _begin(self, at: np.ndarray, req: np.ndarray, pos: np.ndarray) -> None:
        """Let rows `at` [B] be the heads of positions `pos` [B] of requests `req` [B]."""
        rows, ahead = self.rows, pos + 1 - self._known[req]
        rows.pos[at], rows.loop[at], rows.stop[at], rows.survival[at] = pos, 0, HEAD, 1.0
        rows.low[at], rows.high[at] = self._low[req, ahead], self._high[req, ahead]

    def _kept(self, done: np.ndarray, reused: np.ndarray, ended: np.ndarray) -> np.ndarray | None:
        """The rows that stay: not those done, unless reused, nor what generated positions of the
        requests `ended` still have in flight. None if all do."""
        rows = self.rows
        gone = np.zeros(len(rows), bool)
        gone[done] = True
        gone[reused] = False
        if len(ended):
            gone |= np.isin(rows.req, ended) & (rows.pos >= self._prompt[rows.req])
        return np.nonzero(~gone)[0] if gone.any() else None

    def _new_rows(self, req: np.ndarray, pos: np.ndarray, loop: np.ndarray | None = None) -> Rows:
        """Rows [M], no heads, that may run every loop, their survival not known yet."""
        ahead = np.maximum(pos + 1 - self._known[req], 0)
        return Rows(
            req=req,
            pos=pos,
            loop=np.zeros(len(req), np.int64) if loop is None else loop,
            stop=np.full(len(req), self.loops, np.int64),
            low=self._low[req, ahead],
            high=self._high[req, ahead],
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
                    bool(rows.stop[row] == HEAD),
                ),
            )
            for row in range(len(rows))
        ]
