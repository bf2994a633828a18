"""What the exit rules beside the gate read of a loop, always in float32.

Both are confidence measures of T. Schuster et al., *Confident Adaptive Language Modeling* (CALM),
arXiv 2207.07061, section 3.5, with loops in the place of layers.
"""

import numpy as np
import torch


def margin(logits: torch.Tensor) -> np.ndarray:
    """The gap between the two largest probabilities: CALM's softmax response.

    Args:
        logits: [M, vocab] of any float dtype, of the loop's own read-out as it is: no temperature,
            no penalty, no grammar.

    Returns:
        [M] float32, 0..1.
    """
    logits = logits.float()
    top = logits.topk(min(2, logits.shape[-1])).values
    shares = (top - logits.logsumexp(-1, keepdim=True)).exp()
    return (shares[:, 0] - shares[:, 1:].sum(-1)).numpy()


def change(before: torch.Tensor, after: torch.Tensor) -> np.ndarray:
    """How far a loop moved the states: |after - before| / |after|.

    CALM's hidden-state saturation compares the same two states by their angle. The relative change
    is the usual test of an iteration's convergence: S. Bai, J. Z. Kolter, V. Koltun, *Deep
    Equilibrium Models*, arXiv 1909.01377.

    Args:
        before, after: [M, H], normed states of two loops, of any float dtype.

    Returns:
        [M] float32, 0..2 for states of one length.
    """
    before, after = before.float(), after.float()
    return ((after - before).norm(dim=-1) / after.norm(dim=-1).clamp_min(1e-30)).numpy()
