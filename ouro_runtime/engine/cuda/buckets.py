"""Graph buckets: for which numbers of lanes a pass is captured. Plain arithmetic, no torch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

MOST_DRAFT_LANES = 64
"""Lanes of a step with drafts. Up to about so many rows a pass takes as long as its weights take to
be read; beyond, a further row costs what its draft saves."""


def draft_lanes(sizes: Iterable[int], requests: int, loops: int, drafts: bool) -> int:
    """The most lanes of a step with drafts; 0 if there are no such steps.

    Args:
        sizes: `cudagraph_capture_sizes`; empty if nothing is captured. requests: that may run at
            once. loops: T. drafts: whether the server drafts at all.
    """
    most = min(MOST_DRAFT_LANES, requests * loops, max(sizes, default=MOST_DRAFT_LANES))
    return most if drafts and 1 < loops <= most else 0


def pass_buckets(sizes: Iterable[int], lanes: int) -> tuple[int, ...]:
    """The lane counts to capture, ascending: vLLM's capture sizes that fit, and the most lanes.

    Args:
        sizes: `cudagraph_capture_sizes`. Empty: nothing is captured.
        lanes: requests that may run at once (`max_num_seqs`).

    Raises:
        ValueError: for a size or a number of lanes under 1.
    """
    sizes = sorted(set(sizes))
    if lanes < 1 or (sizes and sizes[0] < 1):
        raise ValueError(f"capture sizes {sizes} and lanes {lanes} must be at least 1")
    if not sizes:
        return ()
    fitting = tuple(size for size in sizes if size <= lanes)
    # A batch larger than vLLM's largest capture size runs uncaptured, as it does in vLLM.
    return fitting if lanes in fitting or lanes > sizes[-1] else (*fitting, lanes)


def bucket_for(buckets: Sequence[int], lanes: int) -> int | None:
    """The smallest bucket that holds `lanes`, or None."""
    place = bisect_left(buckets, lanes)
    return buckets[place] if place < len(buckets) else None
