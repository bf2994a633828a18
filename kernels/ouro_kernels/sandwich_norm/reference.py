"""The released model's order of operations, in plain PyTorch."""

import torch


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def _give(value: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    return value if out is None else out.copy_(value)


def rms_norm(x, weight, eps, out=None):
    return _give(_norm(x, weight, eps), out)


def sandwich_norm(x, residual, post_weight, pre_weight, eps, out=None):
    residual.add_(_norm(x, post_weight, eps))
    return _give(_norm(residual, pre_weight, eps), out)


def loop_norm(x, residual, post_weight, final_weight, eps, pre_weight=None, out=None):
    residual.copy_(_norm(residual + _norm(x, post_weight, eps), final_weight, eps))
    return None if pre_weight is None else _give(_norm(residual, pre_weight, eps), out)
