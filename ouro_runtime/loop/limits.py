"""How far a request goes, and where its positions stopped before: one rule for both engines."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ouro_runtime.config import LOSSLESS, MODES, SHARED, ExitParams
from ouro_runtime.loop.rows import Work


def last_readout(prompt: int, max_tokens: int, longest: int) -> int:
    """The last position of a request that may be read out.

    A token is read out at the position before its own, and the last of `longest` positions (the
    model's length) is never computed.

    Args:
        prompt: tokens of the prompt. max_tokens: most tokens it may generate.
    """
    return min(prompt + max_tokens, longest) - 2


def deepest_loop(params: ExitParams, loops: int, prompt_logprobs: bool) -> int:
    """The deepest loop that a request can read K/V of, at its prompt too; T is `loops`. In `shared`
    all that is generated reads loop T of the prompt.

    Args:
        prompt_logprobs: it asks for log-probabilities of its prompt, which are loop T's.
    """
    if params.exit_mode in (LOSSLESS, SHARED) or prompt_logprobs:
        return loops
    return max(params.forced_depths, default=params.max_loops)


def pages_per_token(loops: int) -> dict[str, int]:
    """Loops whose K/V a generated position holds, by mode, of requests that may go to loop T, which
    is `loops`."""
    return {mode: 1 if mode == SHARED else loops for mode in MODES}


def replayed(
    depths: Sequence[int], prompt: int, start: int, end: int, known: int
) -> tuple[int, Sequence[int]]:
    """Positions of generated tokens that a request computes again after a preemption, among
    `start .. end - 1`; they stop at the depth at which they left the first time.

    Args:
        depths: of each token read out so far; token i was read out at position `prompt + i - 1`.
        prompt: tokens of the prompt. known: tokens known; position `known - 1` is the head's.

    Returns:
        The first such position's distance from `start`, and the depth of each, in order.
    """
    first, behind = max(start, prompt), min(end, known - 1)
    return first - start, depths[first - prompt + 1 : max(first, behind) - prompt + 1]


def abreast(depths: Sequence[int], prompt: int, start: int) -> int:
    """How many positions from `start` on, one of what was generated, may be computed again in one
    pass in `shared`. There a position reads, already at loop 1, what those before it left at their
    last loop: that is there in the same pass only of those that left at loop 1.

    Args:
        depths, prompt: as of `replayed`.
    """
    count = 1
    for depth in depths[start - prompt + 1 :]:
        if depth > 1:
            break
        count += 1
    return count


def forced_place(token: np.ndarray, length: np.ndarray | int) -> np.ndarray:
    """Where token number `token` finds its depth among `length` forced ones: they repeat."""
    return token % np.maximum(length, 1)


def depth_limits(work: Sequence[Work], ahead: int) -> tuple[np.ndarray, np.ndarray]:
    """(least, most) loops, both [R, ahead] int64, of the next tokens of requests."""
    low, high = (
        np.repeat(np.array(limits, np.int64)[:, None], ahead, axis=1)
        for limits in ([w.min_loops for w in work], [w.max_loops for w in work])
    )
    for index, w in enumerate(work):
        if w.forced is not None:
            token = w.known - w.prompt + np.arange(ahead)
            low[index] = high[index] = w.forced[forced_place(token, len(w.forced))]
    return low, high
