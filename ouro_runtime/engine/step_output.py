"""What a step tells the scheduler besides tokens; rides on `ModelRunnerOutput.ouro`."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ouro_runtime.loop.rows import Readout
from ouro_runtime.reports import StepReport

CDF_STEPS = 10_000
"""A CDF travels as a whole number of these parts of 1."""


@dataclass
class StepOutput:
    """Depths of a step.

    Attributes:
        notes: request id -> what `pack_notes` made of its tokens, in order.
        report: what the passes did.
        guided: some request left it to the server whether it is drafted.
        lost: by id, why adapters could not be loaded; requests for them have no tokens of worth.
    """

    notes: dict[str, np.ndarray]
    report: StepReport
    guided: bool = False
    lost: dict[int, str] = field(default_factory=dict)

    def depths(self, req_id: str) -> list[int]:
        """The depth of each of a request's tokens."""
        return self.notes[req_id][:, 0].tolist()


COUNTS = ("depths", "loops_run", "drafts", "drafts_dropped")
"""What a token's note counts, in order: the loop at which it was first known; loops run for it; the
loop at which it was drafted, 0 if it was not; drafts of later tokens that were dropped with it."""


def pack_notes(counts: Sequence[np.ndarray], cdf: np.ndarray) -> np.ndarray:
    """[..., 4 + T] int16: the `COUNTS` [...] each, the gate's CDF after each loop [..., T]."""
    notes = np.empty((*cdf.shape[:-1], len(COUNTS) + cdf.shape[-1]), np.int16)
    for place, count in enumerate(counts):
        notes[..., place] = count
    notes[..., len(COUNTS) :] = np.rint(CDF_STEPS * cdf)
    return notes


def note_tokens(readouts: list[Readout], requests: int, loops: int) -> list[np.ndarray]:
    """Notes of the tokens that a step's passes read out, by request; T is `loops`."""
    if not readouts:
        return [np.zeros((0, len(COUNTS) + loops), np.int16)] * requests
    req, final, *counts, cdf = (
        np.concatenate(parts)
        for parts in zip(
            *(
                (out.req, out.final, out.depth, out.loops_run, out.drafted, out.dropped, out.cdf)
                for out in readouts
            ),
            strict=True,
        )
    )
    notes = pack_notes(counts, cdf)
    if not final.all():
        req, notes = req[final], notes[final]
    notes = notes[np.argsort(req, kind="stable")]
    end = np.cumsum(np.bincount(req, minlength=requests)).tolist()
    return [notes[a:b] for a, b in zip([0, *end], end, strict=False)]


def unpack_cdf(notes: np.ndarray) -> list[list[float]]:
    """Of what `pack_notes` made, [tokens, 4 + T]: CDF(1)..CDF(depth) by token, to four digits."""
    cdf = (notes[:, len(COUNTS) :] / CDF_STEPS).tolist()
    return [row[:depth] for row, depth in zip(cdf, notes[:, 0].tolist(), strict=True)]
