"""Time per output token, as clients see it, over the last seconds."""

import math
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple


class Reading(NamedTuple):
    """What a window holds: `p95` in seconds (None without tokens), and over how many tokens."""

    p95: float | None
    tokens: int


class LatencyWindow:
    """A sliding window over deliveries of tokens to clients.

    One delivery may bring several tokens, and the next one fewer, so a single gap says little. A
    token's time is therefore the mean time per token of its request inside the window, and the
    percentile is taken over tokens.

    Args:
        span: seconds that are looked back upon.
        slices: parts of the window that are forgotten at once; bounds the memory and the cost of
            `read`, which is proportional to slices and requests.
    """

    def __init__(self, span: float, slices: int = 16) -> None:
        self.span = span
        self._width = span / slices
        self._slices: deque[tuple[float, dict[str, list[float]]]] = deque()

    def add(self, now: float, deliveries: Iterable[tuple[str, float, int]]) -> None:
        """Note (request, seconds since its last delivery, tokens delivered) at time `now`."""
        if not self._slices or now >= self._slices[-1][0] + self._width:
            self._slices.append((now, {}))
            self._forget(now)
        requests = self._slices[-1][1]
        for request, seconds, tokens in deliveries:
            sums = requests.get(request)
            if sums is None:
                requests[request] = [seconds, tokens]
            else:
                sums[0] += seconds
                sums[1] += tokens

    def read(self, now: float, since: float = -math.inf) -> Reading:
        """The window at time `now`, without what was delivered before `since`."""
        self._forget(now)
        sums: dict[str, list[float]] = {}
        for began, requests in self._slices:
            if began < since:
                continue
            for request, (seconds, tokens) in requests.items():
                total = sums.setdefault(request, [0.0, 0])
                total[0] += seconds
                total[1] += tokens
        return _p95([(seconds / tokens, int(tokens)) for seconds, tokens in sums.values()])

    def _forget(self, now: float) -> None:
        while self._slices and self._slices[0][0] <= now - self.span:
            self._slices.popleft()


def _p95(weighted: list[tuple[float, int]]) -> Reading:
    """The 95th percentile, nearest rank, of values that count so many times."""
    total = sum(count for _, count in weighted)
    rank = math.ceil(0.95 * total)
    for value, count in sorted(weighted):
        rank -= count
        if rank <= 0:
            return Reading(value, total)
    return Reading(None, 0)
