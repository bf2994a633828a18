"""What a step tells the scheduler besides tokens; rides on `ModelRunnerOutput.ouro`."""

from dataclasses import dataclass

import numpy as np

from ouro_runtime.config import StepReport
from ouro_runtime.loop.rows import Readout

CDF_STEPS = 10_000
"""A CDF travels as a whole number of these parts of 1."""


@dataclass
class StepOutput:
    """Depths of a step.

    Attributes:
        notes: request id -> what `pack_notes` made of its tokens, in order.
        report: what the passes did.
    """

    notes: dict[str, np.ndarray]
    report: StepReport

    def depths(self, req_id: str) -> list[int]:
        """The depth of each of a request's tokens."""
        return self.notes[req_id][:, 0].tolist()


def pack_notes(depth: np.ndarray, loops_run: np.ndarray, cdf: np.ndarray) -> np.ndarray:
    """[..., 2 + T] int16: depth and loops run [...], the gate's CDF after each loop [..., T]."""
    notes = np.empty((*depth.shape, 2 + cdf.shape[-1]), np.int16)
    notes[..., 0], notes[..., 1] = depth, loops_run
    notes[..., 2:] = np.rint(CDF_STEPS * cdf)
    return notes


def note_tokens(readouts: list[Readout], requests: int, loops: int) -> list[np.ndarray]:
    """Notes of the tokens that a step's passes read out, by request; T is `loops`."""
    if not readouts:
        return [np.zeros((0, 2 + loops), np.int16)] * requests
    req, depth, every, cdf = (
        np.concatenate(parts)
        for parts in zip(
            *((out.req, out.depth, out.runs_every_loop, out.cdf) for out in readouts), strict=True
        )
    )
    notes = pack_notes(depth, np.where(every, loops, depth), cdf)
    notes = notes[np.argsort(req, kind="stable")]
    end = np.cumsum(np.bincount(req, minlength=requests)).tolist()
    return [notes[a:b] for a, b in zip([0, *end], end, strict=False)]


def unpack_cdf(notes: np.ndarray) -> list[list[float]]:
    """Of what `pack_notes` made, [tokens, 2 + T]: CDF(1)..CDF(depth) by token, to four digits."""
    cdf = (notes[:, 2:] / CDF_STEPS).tolist()
    return [row[:depth] for row, depth in zip(cdf, notes[:, 0].tolist(), strict=True)]
