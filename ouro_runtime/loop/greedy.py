"""Largest entries over the vocabulary, the same ones whoever else is in the batch.

`argmax` works in the logits' own precision: after every pass some rows are read out, and vLLM's
sampler would copy their logits to float32 before it looks at them. `largest` is `torch.topk` with
its ties settled: which of equal entries topk gives depends on k, and a batch's k is that of the
request that asked for most.
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


def largest(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest of each row, largest first, of equal ones the lower index first.

    So the first k of them do not depend on `count`.

    Args:
        scores: [M, vocab] floats; -inf is a score like others, rows with NaN are as topk has them.
        count: 0 to vocab.

    Returns:
        Values and indices [M, count], the indices int64.
    """
    values, indices = scores.topk(count, dim=-1)
    if not count:
        return values, indices
    least = values[:, -1:]
    above, equal = scores > least, scores == least
    missing = count - above.sum(-1, keepdim=True)
    taken = above | (equal & (equal.cumsum(-1) <= missing))
    settled = torch.nonzero(taken.sum(-1) == count).view(-1)
    places = taken[settled].nonzero()[:, 1].view(-1, count)
    held = scores[settled].gather(-1, places)
    held, order = held.sort(dim=-1, descending=True, stable=True)
    values[settled], indices[settled] = held, places.gather(-1, order)
    return values, indices
