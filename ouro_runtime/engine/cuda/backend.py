"""What a step is given: its inputs, and what it needs of the engine that runs its passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass
class LaneShape:
    """What a step needs of a model: T, positions per block, the gate's weights [H] and [1]."""

    loops: int
    block_size: int
    gate_weight: torch.Tensor
    gate_bias: torch.Tensor


@dataclass
class StepInputs:
    """What a step starts from: R lanes (one per request), N rows in the order of the batch.

    In a step with drafts, too, row i is lane i; there are more lanes than rows, L, and where it
    says R of lanes below it is L.

    Attributes:
        lanes: R.
        head_rows: [R] int64, the row of each lane; None if row i is lane i (then N = R).
        input_ids: [N] integer, the rows' tokens; embedded: [N, H]. positions: [N] int64.
        slots: [T, N] int64, each row's slot by loop; read where N > R.
        parts: by pass, the rows that run, see `RowPart`; read where N > R.
        candidates: per pass the plan's candidates on the device, None where there are none.
        plain: the piece "read" serves every read-out of the step.
        padded: rows to run when N > R: N or more.
        row_stop: [N] int32, loops after which a row's K/V stand in for its deeper ones (positions
            computed again after a preemption); None if there are none. row_request: [N] int32,
            the request of each row in the batch; given with it.
        defer: [R] bool, lanes sampled after the step (their tokens need the host); None if none.
        drafts: requests may be drafted; then whoever may be read out is among the candidates of
            every pass, which are all lanes.
    """

    lanes: int
    head_rows: torch.Tensor | None
    input_ids: torch.Tensor
    embedded: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    candidates: list[torch.Tensor | None]
    padded: int
    plain: bool = False
    parts: Sequence[RowPart | None] = ()
    row_stop: torch.Tensor | None = None
    row_request: torch.Tensor | None = None
    defer: torch.Tensor | None = None
    drafts: bool = False


@dataclass
class RowPart:
    """The rows of a mixed pass that run, where not all do: a prompt runs no loop that its request
    cannot read.

    Attributes:
        rows: [n] int64, ascending. requests: [k] int64, theirs, ascending.
        batch: of these requests, what attention needs to know (`cuda/rows.py`).
    """

    rows: torch.Tensor
    requests: torch.Tensor
    batch: Any


@dataclass
class RowView:
    """The rows of a mixed pass: what an attention over runs of rows needs.

    Attributes:
        rows: N; padded: rows to run. positions, slots: [padded] int64.
        loop, seq_lens: [R] int32, per request: the 0-based loop of its rows, and the positions
            that its last row reads.
        part: of them those that run; None: all.
    """

    rows: int
    padded: int
    positions: torch.Tensor
    slots: torch.Tensor
    loop: torch.Tensor
    seq_lens: torch.Tensor
    part: RowPart | None = None


class LaneBackend(Protocol):
    """What a step needs of an engine. Hidden states are those in `LaneBuffers`."""

    def play(self, piece: str, lanes: int, mixed: bool) -> None:
        """Run a piece over the first `lanes` lanes; `mixed`: their states are in `lane_hidden`.

        The pieces are `begin`, `advance` and `carry` of `cuda/pieces.py`; `block`: one pass over
        one row per request and the gate, where every cell also writes its K/V into its deeper loops
        (`fill_copies`); and `read`: whoever leaves is read out, sampled and takes its token. In
        steps with drafts `draft_begin` and so on: those of `cuda/draft_pieces.py`.
        """

    def run_rows(self, view: RowView) -> None:
        """One pass over all rows of a batch with prompt chunks; no gate, no stand-ins."""

    def stand_in(
        self,
        slots: torch.Tensor,
        positions: torch.Tensor,
        loop: torch.Tensor,
        copies: torch.Tensor,
        requests: torch.Tensor | None = None,
    ) -> None:
        """Copy K/V of cells to the deeper loops of their positions.

        Args:
            slots, positions: [M] int64. loop: [M] int32, 0-based. copies: [M] int32, to how many.
            requests: [M] int32, theirs in the batch; None: in order.
        """

    def logits(self, hidden: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """Read-out [M, vocab] of states [M, H]; rows that are not `read` [M] mean nothing."""

    def sample(
        self, lanes: torch.Tensor, logits: torch.Tensor, step: int, positions: torch.Tensor
    ) -> torch.Tensor:
        """Tokens [M] int64 of `lanes` [M] whose heads are at `positions` [M], in pass `step`."""

    def sampled(
        self,
        requests: torch.Tensor,
        read: torch.Tensor,
        tokens: torch.Tensor,
        place: torch.Tensor,
        sampled: torch.Tensor | None = None,
    ) -> None:
        """Those of `requests` that were `read` [M] took their tokens, at `place` of the record.

        Args:
            sampled: [M], which of the lanes just sampled each was; None: in their order.
        """
