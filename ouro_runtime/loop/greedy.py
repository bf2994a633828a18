"""Argmax over the vocabulary, in the logits' own precision.

After every pass some rows are read out, and vLLM's sampler would copy their logits to float32
before it looks at them.
"""

from __future__ import annotations

import numpy as np
import torch

INTEGERS = {2: torch.int16, 4: torch.int32}


def argmax(logits: torch.Tensor) -> np.ndarray:
    """The first largest of each row.

    On the bits of IEEE floats: those of the numbers above zero are in the order of the numbers, and
    above those of all others. Only a row with no number above zero needs more.

    Args:
        logits: [M, vocab], contiguous rows, float32, bfloat16 or float16, without NaN.

    Returns:
        [M] int64.
    """
    bits = logits.view(INTEGERS[logits.element_size()]).numpy()
    tokens = bits.argmax(axis=1)
    for row in np.nonzero(bits[np.arange(len(bits)), tokens] <= 0)[0]:
        tokens[row] = logits[row].argmax()
    return tokens
