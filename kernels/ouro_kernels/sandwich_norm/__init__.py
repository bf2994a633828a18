"""Sandwich norms: what stands between two sub-layers of the block, in one pass over memory."""

import torch

from ouro_kernels._backend import backend
from ouro_kernels._checks import FLOATS, check, check_optional


def _check_rows(x: torch.Tensor, eps: float, **others: torch.Tensor | None) -> None:
    check("x", x, (None, None), FLOATS, x.device)
    rows, hidden = x.shape
    for name, tensor in others.items():
        shape = (hidden,) if name.endswith("weight") else (rows, hidden)
        check_optional(name, tensor, shape, x.dtype, x.device)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """RMSNorm of x [N, H]: fp32 statistics, cast back to x's dtype, times weight [H].

    The entry of a pass (layer 0's input norm). `out` may be x.
    """
    _check_rows(x, eps, weight=weight, out=out)
    return backend("sandwich_norm", x).rms_norm(x, weight, eps, out)


def sandwich_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    post_weight: torch.Tensor,
    pre_weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual += norm(x, post_weight), in place; return norm(residual, pre_weight).

    x [N, H] is a sub-layer's output, residual [N, H] the stream. Every step is rounded to x's
    dtype, as the released model does. `out` may be x.
    """
    _check_rows(x, eps, residual=residual, post_weight=post_weight, pre_weight=pre_weight, out=out)
    return backend("sandwich_norm", x).sandwich_norm(x, residual, post_weight, pre_weight, eps, out)


def loop_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    post_weight: torch.Tensor,
    final_weight: torch.Tensor,
    eps: float,
    pre_weight: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """The loop boundary: residual = norm(residual + norm(x, post_weight), final_weight).

    residual [N, H] is overwritten with the normed state: the read-out, the gate's input and the
    next loop's stream. With `pre_weight` (layer 0's input norm) norm(residual, pre_weight) is
    returned as well, for a pass whose every row goes on to the next loop; otherwise None.
    """
    _check_rows(
        x,
        eps,
        residual=residual,
        post_weight=post_weight,
        final_weight=final_weight,
        pre_weight=pre_weight,
        out=out,
    )
    return backend("sandwich_norm", x).loop_norm(
        x, residual, post_weight, final_weight, eps, pre_weight, out
    )
