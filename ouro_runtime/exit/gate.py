"""Gate arithmetic: survival and the cumulative exit distribution, always in float32.

Source: *Scaling Latent Reasoning via Looped Language Models*, arXiv 2510.25741, section 3: with the
gate's output lambda_t, S(n) = prod_{j<=n} (1 - lambda_j) and CDF(n) = 1 - S(n) for n < T.
"""

import numpy as np
import torch


def halt_probability(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """lambda of each row: sigmoid of the gate's linear layer.

    Product and sum, not a matrix product: they fuse with the norm before them.

    Args:
        hidden: [N, H], normed states of any float dtype.
        weight: [1, H]; bias: [1].

    Returns:
        [N] float32.
    """
    logit = (hidden.float() * weight.float()).sum(dim=-1) + bias.float()
    return torch.sigmoid(logit)


def survive(survival: np.ndarray, halt: np.ndarray) -> np.ndarray:
    """S(n) from S(n - 1) and lambda_n; both [N] float32."""
    return survival * (1.0 - halt)
