"""The two training objectives of looped language models (arXiv 2510.25741, sections 3.3 and 3.4).

Notation: T loops, N tokens; `loss[t]` is the cross-entropy of a token when it is read out after
loop t; `lambda[t]` the gate's exit probability there. Loops are 0-based in the code, 1-based in
formulas.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Target = Literal["paper", "shifted", "remaining"]


def exit_log_probs(gate_logits: Tensor) -> Tensor:
    """Log of the exit distribution p(t).

    gate_logits [T, N], float: logit of lambda_t. Returns [T, N] of the same dtype.

    p(t) = lambda_t * S(t-1) for t < T and p(T) = S(T-1), with S(n) = prod_{j<=n} (1 - lambda_j):
    the last loop takes what is left, so the last row of the input is not used and gets no gradient.
    """
    stay = F.logsigmoid(-gate_logits[:-1]).cumsum(0)
    before = torch.cat((torch.zeros_like(stay[:1]), stay[:-1]))
    return torch.cat((F.logsigmoid(gate_logits[:-1]) + before, stay[-1:]))


def stage1_loss(losses: Tensor, gate_logits: Tensor, beta: float) -> Tensor:
    """Stage I: expected loss under the exit distribution, less beta times its entropy.

    losses [T, N] float, gate_logits [T, N] float. Returns a scalar: the mean over tokens of
    sum_t p(t) L(t) - beta H(p). With a uniform prior over exit steps this is the negative ELBO up
    to a constant (the KL to the uniform is log T - H(p)). Gradients reach the losses and the gate.
    """
    log_p = exit_log_probs(gate_logits)
    p = log_p.exp()
    return (p * (losses + beta * log_p)).sum(0).mean()


def continue_targets(
    losses: Tensor, target: Target, slope: float = 50.0, threshold: float = 0.005
) -> Tensor:
    """What Stage II wants 1 - lambda_t to be: w = sigmoid(slope * (I - threshold)), in [0, 1].

    losses [T, N] float; returns [T - 1, N], without gradient. Row by row the improvement I is, with
    max(0, .) applied:
      paper      L(t-1) - L(t)  for t = 2..T      (what loop t has just brought)
      shifted    L(t) - L(t+1)  for t = 1..T-1    (what one more loop will bring)
      remaining  L(t) - L(T)    for t = 1..T-1    (what is still to come in all; not in the paper)
    So the same numbers serve "paper" and "shifted"; they differ in the gate they are held against.
    """
    losses = losses.detach()
    gain = losses[:-1] - (losses[-1:] if target == "remaining" else losses[1:])
    return torch.sigmoid(slope * (gain.clamp_min(0) - threshold))


def stage2_loss(gate_logits: Tensor, losses: Tensor, target: Target = "shifted") -> Tensor:
    """Stage II: binary cross-entropy of 1 - lambda_t against `continue_targets`, over T.

    gate_logits [T, N] float with gradient, losses [T, N] float of the frozen language model.
    Returns a scalar, the mean over tokens of (1/T) sum_t BCE. As the paper writes it ("paper")
    the sum runs over t = 2..T, and lambda_1 learns from nothing. For the other targets it runs over
    t = 1..T-1, and lambda_T, which never decides anything, learns from nothing.
    """
    wanted = continue_targets(losses, target)
    used = gate_logits[1:] if target == "paper" else gate_logits[:-1]
    bce = F.binary_cross_entropy_with_logits(-used, wanted, reduction="none")
    return bce.sum(0).mean() / gate_logits.shape[0]
