"""Read-out: the product with the vocabulary, paid only where a row is read out."""

import torch

from ouro_kernels._backend import backend
from ouro_kernels._checks import FLOATS, check


def read_out(hidden: torch.Tensor, weight: torch.Tensor, read_mask: torch.Tensor) -> torch.Tensor:
    """Logits [N, V] of the rows of `read_mask` (bool [N]); all other rows are 0.

    hidden [N, H] (the normed state), weight [V, H] (the output embedding), both of one dtype, which
    is the result's; sums are fp32. Who is read out is known on the device only, so the launch is
    the same for every mask; where no row is set, the weight is not read.
    """
    check("hidden", hidden, (None, None), FLOATS, hidden.device)
    rows, size = hidden.shape
    check("weight", weight, (None, size), hidden.dtype, hidden.device)
    check("read_mask", read_mask, (rows,), torch.bool, hidden.device)
    return backend("read_out", hidden).read_out(hidden, weight, read_mask)
