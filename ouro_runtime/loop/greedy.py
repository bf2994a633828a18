"""Argmax over the vocabulary, in the logits' own precision.

After every pass some rows are read out, and vLLM's sampler would copy their logits to float32
before it looks at them.
"""

from __future__ import annotations

import numba
import numpy as np
import torch

INTEGERS = {2: torch.int16, 4: torch.int32}


@numba.njit(nogil=True)
def _first_largest(bits, rest, tokens):  # pragma: no cover (compiled)
    """`argmax` on the bits of IEEE floats. With the sign bit set more means less, so the `rest` of
    the bits is flipped; then -0 is -1, next to 0, and counts as 0."""
    shift = 8 * bits.itemsize - 1
    for row in range(bits.shape[0]):
        words = bits[row]
        best = words[0] ^ ((words[0] >> shift) & rest)
        for place in range(words.shape[0]):
            word = words[place]
            best = max(best, word ^ ((word >> shift) & rest))
        least = -1 if best == 0 else best
        for place in range(words.shape[0]):
            word = words[place]
            if word ^ ((word >> shift) & rest) >= least:
                tokens[row] = place
                break


def argmax(logits: torch.Tensor) -> np.ndarray:
    """The first largest of each row.

    Args:
        logits: [M, vocab], contiguous rows, float32, bfloat16 or float16, without NaN.

    Returns:
        [M] int64.
    """
    tokens = np.empty(len(logits), np.int64)
    bits = logits.view(INTEGERS[logits.element_size()]).numpy()
    _first_largest(bits, bits.dtype.type(np.iinfo(bits.dtype).max), tokens)
    return tokens
