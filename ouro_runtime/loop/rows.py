"""What goes into a step's passes and comes out of them: rows and how they move, plain numpy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Carried:
    """A row left unfinished at the end of a step.

    Attributes:
        position: of the token; loop: loops done; head: not read out yet.
        history: [T] float32, S(1)..S(loop), then anything.
        draft: the token that was read out early here and is still to be confirmed; -1 if none.
        drafted: the loop at which it was. next: its position has not been started yet.
        hidden: the state that enters the next loop (opaque here).
    """

    position: int
    loop: int
    history: np.ndarray
    head: bool
    draft: int = -1
    drafted: int = 0
    next: bool = False
    hidden: Any = None


@dataclass
class Work:
    """What one request brings into a step.

    Attributes:
        start, count: positions `start .. start + count - 1` are scheduled.
        known: tokens known so far; position `known - 1` is the head's.
        prompt: tokens of the original prompt.
        last: the last position that may be read out (token and length limits).
        threshold, margin, delta: of the exit rules `gate`, `margin` and `delta` (`exit/policy.py`),
            all but the request's own turned off.
        min_loops, max_loops: limits of its depths; `forced`, if any, [F] depths by token.
        deepest: no position runs a loop after this one, since nobody can read it; 0 for T.
        exact: K/V mode `exact`; lossless: `lossless`; shared: `shared`; none of them: `skip`.
        drafts: a lossless request may be drafted in this step.
        guided: where to draft is the `DraftRule`'s to say, not the exit rule's.
        seat: where the `DraftRule` keeps its record of the request.
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
    margin: float = 1.0
    delta: float = 0.0
    min_loops: int = 1
    max_loops: int = 1
    deepest: int = 0
    forced: np.ndarray | None = None
    exact: bool = False
    lossless: bool = False
    shared: bool = False
    drafts: bool = False
    guided: bool = False
    seat: int = 0
    single: bool = False
    depths: list[int] = field(default_factory=list)
    carried: list[Carried] = field(default_factory=list)


@dataclass
class Rows:
    """Rows of the next pass, structure of arrays, all [N]; order is the order of hidden states."""

    req: np.ndarray  # int64, index of the request in the step
    pos: np.ndarray  # int64
    loop: np.ndarray  # int64, loops done: also the 0-based loop that runs next
    stop: np.ndarray  # int64, loops after which a row is done; HEAD for a head
    low: np.ndarray  # int64, least loops of a head's token
    high: np.ndarray  # int64, most loops of a head's token
    survival: np.ndarray  # float32, S(loop)
    history: np.ndarray  # [N, T] float32, S(1)..S(loop) of a head, then anything
    draft: np.ndarray  # int64, the token drafted here and still to be confirmed, else -1
    drafted: np.ndarray  # int64, the loop at which it was, else 0

    def __len__(self) -> int:
        return len(self.req)

    def take(self, index: np.ndarray) -> Rows:
        """The rows at `index` (integer or boolean)."""
        return Rows(*(getattr(self, name)[index] for name in ROW_FIELDS))

    def append(self, other: Rows) -> Rows:
        """These rows, then the other ones."""
        pairs = ((getattr(self, name), getattr(other, name)) for name in ROW_FIELDS)
        return Rows(*(np.concatenate(pair) for pair in pairs))


ROW_FIELDS = tuple(Rows.__dataclass_fields__)
HEAD = 1 << 30
"""The `stop` of a head: only the exit rule ends it."""
OWED = HEAD + 1
"""The `stop` of a row that was drafted: read out once more, after loop T."""


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

    @classmethod
    def of(cls, rows: Rows) -> Segments:
        """The sequences of `rows`, in their order."""
        n = len(rows)
        if n == 1 or (rows.req[1:] != rows.req[:-1]).all():
            return cls(
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
        return cls(
            first=first,
            req=rows.req[begin],
            loop=rows.loop[begin],
            seq_len=(rows.pos[last] + 1).astype(np.int32),
            max_query=int((first[1:] - first[:-1]).max()),
        )


@dataclass
class Readout:
    """Rows read out after a pass.

    Attributes:
        rows: [M] int64, their rows. req: [M] int64.
        depth: [M] int64, the loop of the read-out; once `StepPlan.advance` has held it against its
            draft, the loop at which the token was first known.
        final: [M] bool, the token stays; else it is a draft.
        loops_run: [M] int64, cells run for the token, those of dropped positions included.
        draft: [M] int64, of a final one: the token that was drafted there, else -1.
        drafted: [M] int64, the loop at which it was, else 0.
        dropped: [M] int64, drafts of later positions that were dropped with it.
        tail: [M] bool, the row is its prompt's last position.
        exact: [M] bool, K/V mode `exact`.
        deferred: [M] bool, sampled after the step, not now.
        cdf: [M, T] float32, the gate's CDF(1)..CDF(depth), then zeros. CDF(T) is 1.
    """

    rows: np.ndarray
    req: np.ndarray
    depth: np.ndarray
    tail: np.ndarray
    exact: np.ndarray
    deferred: np.ndarray
    cdf: np.ndarray
    final: np.ndarray
    loops_run: np.ndarray
    draft: np.ndarray
    drafted: np.ndarray
    dropped: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def right(self, tokens: np.ndarray) -> np.ndarray:
        """[M] bool: final ones whose draft was the token, of `tokens` [M]."""
        return self.final & (self.draft == tokens)


@dataclass
class Left:
    """Positions whose loops are over early: their K/V stands for the deeper loops.

    Attributes:
        req, pos, depth: [M] int64, requests, positions, loops run.
    """

    req: np.ndarray
    pos: np.ndarray
    depth: np.ndarray

    def __len__(self) -> int:
        return len(self.req)


@dataclass
class Move:
    """How rows change between two passes.

    Attributes:
        left: positions that left early.
        reuse, append: indices into the sampled tokens: their successors take the place of the row
            that was read out, or come after all rows.
        reuse_rows: rows taken by the successors of `reuse`.
        keep: rows that stay, None if all do (applied after reuse, before append).
        done: rows that finished their last loop.
    """

    left: Left
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
NOBODY = np.zeros(0, bool)
STAY = Move(Left(NONE, NONE, NONE), NONE, NONE, NONE, None, NONE)
