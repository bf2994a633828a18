"""What the engine tells of its steps and tokens: to the API process, and from there to metrics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

PARTS = ("block", "metadata", "read_out", "stand_in", "plan")
"""Where the time of a step's passes goes: the block itself; attention metadata; logits and
sampling; stand-in K/V; planning, exit rule and moving states."""


@dataclass
class StepReport:
    """What the passes of one engine step did.

    Attributes:
        pass_rows: rows (cells) of each pass, in order; at most T entries.
        rows_by_loop: entry t: cells run at loop t + 1.
        kv_pages: entry t: K/V pages that requests hold at loop t + 1; empty on CUDA.
        tokens: tokens sampled in the step.
        seconds: wall time of the passes by part (`PARTS`).
    """

    pass_rows: list[int] = field(default_factory=list)
    rows_by_loop: list[int] = field(default_factory=list)
    kv_pages: list[int] = field(default_factory=list)
    tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


class Delivery(NamedTuple):
    """Tokens of one request handed to its client at once, `seconds` after the ones before."""

    request: str
    seconds: float
    tokens: int


class Finished(NamedTuple):
    """A request that ended: its tokens, the sum of their depths, and its mean time per token after
    the first (None without any)."""

    depth_sum: int
    tokens: int
    seconds_per_token: float | None = None


@dataclass
class DepthReport:
    """What one engine iteration brought to the API process (`IterationStats.ouro`).

    Attributes:
        depths, loops_run, drafts: one entry per token that was handed to a client; `drafts` is the
            loop at which a token was drafted, 0 if it was not. A draft was right where that is the
            token's depth.
        drafts_dropped: drafts of tokens that were never handed to anybody.
        deliveries: the same tokens by request, without each request's first delivery.
        finished: the requests that ended.
        steps: the engine steps reported.
    """

    depths: list[int] = field(default_factory=list)
    loops_run: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    drafts_dropped: int = 0
    deliveries: list[Delivery] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)
    steps: list[StepReport] = field(default_factory=list)
