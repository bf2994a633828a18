"""What the benchmark asks of an engine, and the bounds it holds the answers against."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

LOOPS, PROMPT = 4, 8
"""T of the checkpoints that are measured, and tokens of a prompt."""

FULL: dict[str, Any] = {"exit_threshold": 1.0, "exit_mode": "skip"}
"""Every loop, without drafts."""

SHARES: dict[float, tuple[float, ...]] = {
    4.0: (0.0, 0.0, 0.0, 1.0),
    2.5: (0.25, 0.25, 0.25, 0.25),
    2.0: (0.375, 0.375, 0.125, 0.125),
    1.5: (0.6875, 0.1875, 0.0625, 0.0625),
}
"""Mean depth -> share of the tokens that leave at each of the four loops."""


def depth_lists(mean: float, tokens: int, requests: int, seed: int = 0) -> list[list[int]]:
    """Forced depths of `requests` requests: the first token at depth 4, then `tokens` more.

    All get the same depths in orders of their own, so that every request runs as many loops and
    the batch stays full to the end. Their mean is `mean` exactly; `tokens` is a multiple of 16.
    """
    assert tokens % 16 == 0, tokens
    depths = [
        loop for loop, share in enumerate(SHARES[mean], 1) for _ in range(int(share * tokens))
    ]
    rng = random.Random(seed)
    return [[4, *rng.sample(depths, len(depths))] for _ in range(requests)]


def prompts(requests: int, length: int, vocab: int, seed: int = 0) -> list[list[int]]:
    """Random prompts; id 0, the released models' EOS, is left out."""
    rng = random.Random(seed)
    return [[rng.randrange(1, vocab) for _ in range(length)] for _ in range(requests)]


def fit_line(seconds: Mapping[int, float]) -> tuple[float, float]:
    """(F0, F1) of the least-squares line: a token's seconds at a fixed depth are F0 + depth F1."""
    line = statistics.linear_regression(list(seconds), list(seconds.values()))
    return line.intercept, line.slope


def bound(fixed: float, loop: float, loops: int, mean: float) -> float:
    """The most that a mean depth of `mean` can bring over full depth: (F0 + T F1) / (F0 + d F1)."""
    return (fixed + loops * loop) / (fixed + mean * loop)


def read_outs(mean: float, batch: int) -> float:
    """Passes with a read-out, for one token of each of `batch` requests of this mean depth whose
    loops do not move in step: of `mean` passes, those in which at least one leaves."""
    return mean * (1 - (1 - 1 / mean) ** batch)


def reachable(
    fixed: float, loop: float, loops: int, mean: float, batch: int, together: float, spread: float
) -> float:
    """`bound` less what no order of cells can save: tokens that leave in different passes are read
    out in different passes, and each time the whole vocabulary's weights are read.

    Args:
        together: seconds of the product with the vocabulary for a step's tokens at once.
        spread: the same for those of one pass.
    """
    adaptive = fixed - together + read_outs(mean, batch) * spread + mean * loop
    return (fixed + loops * loop) / adaptive


def drafted(
    passes: Mapping[int, float], heads: Mapping[int, float], batch: int, loops: int, mean: float
) -> float:
    """The most that drafts can bring `batch` requests that run `mean` passes a token, if each is
    right and nothing else takes time: their `loops` cells a token share the passes, and all tokens
    are read out twice, once as a draft.

    Args:
        passes: seconds of a pass by its rows, at least from `batch` to `loops` times as many.
        heads: seconds of a product with the vocabulary, by its rows.
    """

    def at(known: Mapping[int, float], rows: float) -> float:
        return float(np.interp(rows, sorted(known), [known[count] for count in sorted(known)]))

    full = loops * at(passes, batch) + at(heads, batch)
    return full / (mean * (at(passes, batch * loops / mean) + at(heads, 2 * batch / mean)))


def agreement(left: Sequence[Sequence[int]], right: Sequence[Sequence[int]]) -> float:
    """Share of tokens that come before the first one that differs."""
    same = total = 0
    for one, other in zip(left, right, strict=True):
        total += len(one)
        for a, b in zip(one, other, strict=True):
            if a != b:
                break
            same += 1
    return same / total
