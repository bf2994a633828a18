"""Graph buckets: for which numbers of lanes a pass is captured. Plain arithmetic, no torch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence


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
