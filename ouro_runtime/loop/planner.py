"""Which cells run next: plain numpy, no torch, no vLLM.

A step is up to T passes over a flat set of rows. A row is a position of a request on its way down
its column of cells. Rows are of two kinds:

- a *head* is the newest token's position: when its exit rule fires it is read out, and its token's
  position may enter the next pass as a new head;
- any other row only runs until it has done `stop` loops: prompt positions (all that the request can
  read), positions computed again after a preemption (the depth they left at), and in `exact` mode
  positions that were read out and still owe their deeper loops.

In `lossless` a head that is read out early only gives a *draft*: its successor starts, its own
deeper loops run on, and after loop T it is read out again. If that is another token, what was
started after it is dropped (`loop/drafts.py` says when to draft).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ouro_runtime.exit.cdf import exit_cdf
from ouro_runtime.loop.limits import depth_limits, replayed
from ouro_runtime.loop.rows import (
    HEAD,
    NOBODY,
    NONE,
    OWED,
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
        self.loops = self.passes_left = loops
        self.work = work
        self.threshold = np.array([w.threshold for w in work], np.float32)
        self.margin = np.array([w.margin for w in work], np.float32)
        self.delta = np.array([w.delta for w in work], np.float32)
        self.reads_out, self.compares = bool((self.margin < 1).any()), bool((self.delta > 0).any())
        self._prompt = np.array([w.prompt for w in work], np.int64)
        self._last = np.array([w.last for w in work], np.int64)
        self._exact = np.array([w.exact for w in work], bool)
        self._lossless = np.array([w.lossless for w in work], bool)
        self._shared = np.array([w.shared for w in work], bool)
        self._drafts = np.array([w.drafts and not w.single for w in work], bool)
        self.drafting = bool(self._lossless.any())
        self.guided = np.array([w.guided for w in work], bool)
        self.seat = np.array([w.seat for w in work], np.int64)
        self._single = np.array([w.single for w in work], bool)
        self._known = np.array([w.known for w in work], np.int64)
        self._deepest = np.array([w.deepest or loops for w in work], np.int64)
        self._low, self._high = depth_limits(work, 2 * loops)
        self.rows = self._first_rows(work)
        self.scheduled = int(sum(w.count for w in work))
        self._segments: Segments | None = None
        self._unborn: set[tuple[int, int]] = set()

    def _first_rows(self, work: list[Work]) -> Rows:
        """Scheduled positions in request order, then the other rows carried over, then the heads
        whose drafts came too late to start them."""
        count = np.array([w.count for w in work], np.int64)
        start = np.array([w.start for w in work], np.int64)
        req = np.repeat(np.arange(len(work)), count)
        offset = np.arange(len(req)) - np.repeat(np.cumsum(count) - count, count)
        pos = start[req] + offset
        rows = self._new_rows(req, pos)
        rows.stop[pos == self._known[req] - 1] = HEAD
        self.restore: list[tuple[int, Carried]] = []
        first = np.cumsum(count) - count
        others: list[tuple[int, Carried]] = []
        born: list[tuple[int, Carried]] = []
        for index, w in enumerate(work):
            self._replay(rows, w, int(first[index]))
            for carried in w.carried:
                if carried.next:
                    born.append((index, carried))
                if carried.position != w.start:
                    assert w.lossless or not carried.head, "a carried head moved"
                    others.append((index, carried))
                    continue
                assert w.count == 1, "a carried row moved"
                self._take_up(rows, int(first[index]), carried)
        if others:
            at = len(rows)
            taken = self._new_rows(
                req=np.array([index for index, _ in others], np.int64),
                pos=np.array([c.position for _, c in others], np.int64),
            )
            rows = rows.append(taken)
            for place, (_, carried) in enumerate(others):
                self._take_up(rows, at + place, carried)
        self.born = np.array([carried.draft for _, carried in born], np.int64)
        if born:
            heads = self._new_rows(
                req=np.array([index for index, _ in born], np.int64),
                pos=np.array([c.position + 1 for _, c in born], np.int64),
            )
            heads.stop[:] = HEAD
            rows = rows.append(heads)
        return rows

    def _take_up(self, rows: Rows, row: int, carried: Carried) -> None:
        """Let `row` go on where the step before left it."""
        rows.loop[row] = carried.loop
        rows.survival[row] = carried.history[carried.loop - 1]
        rows.history[row] = carried.history
        rows.draft[row], rows.drafted[row] = carried.draft, carried.drafted
        if carried.draft >= 0:
            rows.stop[row] = OWED
        else:
            rows.stop[row] = HEAD if carried.head else self._deepest[rows.req[row]]
        self.restore.append((row, carried))

    def _replay(self, rows: Rows, w: Work, first: int) -> None:
        """Positions of generated tokens that are computed again stop where they left before."""
        if w.exact or w.lossless or w.start + w.count <= w.prompt or w.start >= w.known - 1:
            return
        offset, depths = replayed(w.depths, w.prompt, w.start, w.start + w.count, w.known)
        rows.stop[first + offset : first + offset + len(depths)] = depths

    def segments(self) -> Segments:
        """The sequences of the next pass."""
        if self._segments is None:
            self._segments = Segments.of(self.rows)
        return self._segments

    def draftable(self) -> np.ndarray:
        """[N] bool: rows whose token may be drafted; a draft of the last would start nothing."""
        req = self.rows.req
        return self._drafts[req] & (self.rows.pos < self._last[req])

    def undecided(self, asked: np.ndarray, least: int = 1) -> np.ndarray:
        """Rows [M] of the requests `asked` [R] bool for whom the pass at hand is the `least`-th or
        later and an exit rule, not a limit, says whether they are read out after it."""
        rows, depth = self.rows, self.rows.loop + 1
        low = np.maximum(rows.low, least)
        open_ = asked[rows.req] & (rows.stop == HEAD) & (depth >= low) & (depth < rows.high)
        if self.drafting:
            open_ &= ~self._lossless[rows.req] | self.draftable()
        return np.nonzero(open_)[0]

    def readout(self, exits: np.ndarray) -> Readout:
        """Count the loop just run and name the rows that are read out.

        Args:
            exits: [N] bool, the exit rule's answer for every row (ignored where not a head).
        """
        every = self.rows
        every.history[np.arange(len(every)), every.loop] = every.survival
        every.loop += 1
        leaving, last = exits & (every.stop == HEAD), every.loop >= self.loops
        if self.drafting:
            leaving &= ~self._lossless[every.req] | self.draftable() | last
            leaving |= last & (every.stop == OWED)
        rows = np.nonzero(leaving)[0]
        if not len(rows):
            cdf = np.zeros((0, self.loops), np.float32)
            return Readout(rows, NONE, NONE, NOBODY, NOBODY, NOBODY, cdf, NOBODY, *[NONE] * 4)
        req, depth = every.req[rows], every.loop[rows]
        tail = every.pos[rows] == self._prompt[req] - 1
        exact, lossless = self._exact[req], self._lossless[req]
        return Readout(
            rows,
            req,
            depth,
            tail=tail,
            exact=exact,
            deferred=self._single[req],
            cdf=exit_cdf(every.history[rows], depth),
            final=~lossless | (depth >= self.loops),
            loops_run=np.where(tail | exact | lossless, self._deepest[req], depth),
            draft=every.draft[rows],
            drafted=every.drafted[rows],
            dropped=np.zeros(len(rows), np.int64),
        )

    def void(self, out: Readout, tokens: np.ndarray, finished: np.ndarray) -> np.ndarray:
        """[M] bool: drafts of `out` that are in vain, for their request has just ended or turned
        out to go on otherwise.

        Args:
            tokens, finished: [M], of the final ones.
        """
        cut = self._cut(out, tokens, finished)
        return ~out.final & (self.rows.pos[out.rows] > cut[out.req])

    def _cut(self, out: Readout, tokens: np.ndarray, finished: np.ndarray) -> np.ndarray:
        """[R] int64, of every request: positions after this one are dropped."""
        wrong = (out.draft >= 0) & ~out.right(tokens)
        ends = out.final & self._lossless[out.req] & (finished | wrong)
        cut = np.full(len(self.work), HEAD, np.int64)
        cut[out.req[ends]] = self.rows.pos[out.rows[ends]]
        return cut

    def _settle(self, out: Readout, tokens: np.ndarray, finished: np.ndarray) -> np.ndarray:
        """Hold the final tokens of lossless requests against their drafts, and bill what is dropped
        to the token it is dropped with.

        Returns:
            [N] bool: rows that are dropped.
        """
        rows = self.rows
        gone = rows.pos > self._cut(out, tokens, finished)[rows.req]
        if gone.any():
            place = np.zeros(len(self.work), np.int64)
            place[out.req[out.final]] = np.nonzero(out.final)[0]
            at = place[rows.req[gone]]
            np.add.at(out.loops_run, at, rows.loop[gone])
            np.add.at(out.dropped, at, rows.draft[gone] >= 0)
        return gone

    def advance(self, out: Readout, tokens: np.ndarray, finished: np.ndarray) -> Move:
        """Rows of the next pass.

        Args:
            out: what `readout` returned. tokens: [M] int64, read only of lossless requests.
            finished: [M] bool, the request ends with this token; it ends at its last position
                whatever this says.
        """
        self.passes_left -= 1
        over = np.nonzero(self.rows.loop >= self.rows.stop)[0]  # never a head
        if not len(out) and not len(over):
            self._segments = replace(self.segments(), loop=self.segments().loop + 1)
            return STAY
        self._segments = None
        pos = self.rows.pos[out.rows]
        finished = finished | (pos >= self._last[out.req])
        gone = self._settle(out, tokens, finished) if self.drafting else None
        stays, starts = self._fates(out, tokens, finished, gone)
        left, done = self._leave(out, pos, over, stays, finished)
        reuse = np.nonzero(starts & ~stays)[0]
        append = np.nonzero(starts & stays)[0]
        reuse_rows = out.rows[reuse]
        self.rows.stop[out.rows] = self._deepest[out.req]  # read out: heads no more
        if self.drafting:
            self._draft(out, tokens, finished)
        if len(reuse):
            self._begin(reuse_rows, out.req[reuse], pos[reuse] + 1)
        keep = self._kept(done, reuse_rows, out.req[finished & out.exact & ~out.tail], gone)
        if keep is not None:
            self.rows = self.rows.take(keep)
        if len(append):
            born = self._new_rows(out.req[append], pos[append] + 1)
            born.stop[:] = HEAD
            self.rows = self.rows.append(born)
        return Move(left, reuse, reuse_rows, append, keep, done)

    def _fates(
        self, out: Readout, tokens: np.ndarray, finished: np.ndarray, gone: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of the rows read out, [M] bool each: those that stay to run their deeper loops, and those
        whose token's position starts in the next pass."""
        deeper = out.depth < self._deepest[out.req]
        stays = deeper & (out.tail | (out.exact & ~finished) | ~out.final)
        # In `shared` a generated position reads loop T of its prompt, at every loop.
        waits = finished | out.deferred | (self._shared[out.req] & out.tail)
        starts = ~waits if self.passes_left else np.zeros(len(out), bool)
        if gone is not None:
            # Dropped, or confirmed: its successor is on its way.
            starts &= ~gone[out.rows] & ~out.right(tokens)
        return stays, starts

    def _draft(self, out: Readout, tokens: np.ndarray, finished: np.ndarray) -> None:
        """Note the drafts of `out`, and of its final tokens at which loop they were first known."""
        rows = self.rows
        right = out.right(tokens)
        drafts = ~out.final
        at = out.rows[drafts]
        rows.draft[out.rows], rows.drafted[out.rows] = -1, 0
        rows.draft[at], rows.drafted[at], rows.stop[at] = tokens[drafts], out.depth[drafts], OWED
        if not self.passes_left:
            late = drafts & ~finished
            self._unborn = set(
                zip(out.req[late].tolist(), rows.pos[out.rows[late]].tolist(), strict=True)
            )
        out.depth[right] = out.drafted[right]

    def _leave(
        self,
        out: Readout,
        pos: np.ndarray,
        over: np.ndarray,
        stays: np.ndarray,
        finished: np.ndarray,
    ) -> tuple[Left, np.ndarray]:
        """Positions that left early, and the rows [D] that are done.

        Args:
            pos: [M], of the rows read out. over: rows that have run all they had to.
            stays: [M] bool, the row goes on. finished: [M] bool, nobody reads the position again.
        """
        owing = np.nonzero((out.depth < self._deepest[out.req]) & ~(stays | finished))[0]
        left = Left(out.req[owing], pos[owing], out.depth[owing])
        done = out.rows[~stays]
        if not len(over):
            return left, done
        rows = self.rows
        replayed = over[rows.loop[over] < self._deepest[rows.req[over]]]
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

    def _kept(
        self, done: np.ndarray, reused: np.ndarray, ended: np.ndarray, gone: np.ndarray | None
    ) -> np.ndarray | None:
        """The rows that stay: not those done, unless reused, nor those already `gone`, nor what
        generated positions of the requests `ended` still have in flight. None if all do."""
        rows = self.rows
        gone = np.zeros(len(rows), bool) if gone is None else gone
        gone[done] = True
        gone[reused] = False
        if len(ended):
            gone |= np.isin(rows.req, ended) & (rows.pos >= self._prompt[rows.req])
        return np.nonzero(~gone)[0] if gone.any() else None

    def _new_rows(self, req: np.ndarray, pos: np.ndarray) -> Rows:
        """Rows [M], no heads, that may run every loop, their survival not known yet."""
        ahead = np.maximum(pos + 1 - self._known[req], 0)
        return Rows(
            req=req,
            pos=pos,
            loop=np.zeros(len(req), np.int64),
            stop=self._deepest[req],
            low=self._low[req, ahead],
            high=self._high[req, ahead],
            survival=np.ones(len(req), np.float32),
            history=np.ones((len(req), self.loops), np.float32),
            draft=np.full(len(req), -1, np.int64),
            drafted=np.zeros(len(req), np.int64),
        )

    def leftovers(self) -> list[tuple[int, int, Carried]]:
        """(row, request, state) of every row to be carried over; hidden states are the caller's."""
        left, rows = [], self.rows
        for row, (req, pos) in enumerate(zip(rows.req.tolist(), rows.pos.tolist(), strict=True)):
            carried = Carried(
                pos,
                int(rows.loop[row]),
                rows.history[row].copy(),
                head=bool(rows.stop[row] == HEAD),
                draft=int(rows.draft[row]),
                drafted=int(rows.drafted[row]),
                next=(req, pos) in self._unborn,
            )
            left.append((row, req, carried))
        return left
