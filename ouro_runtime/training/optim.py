"""Muon for the matrices of the layers, AdamW for everything else."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ouro_runtime.training.model import LoopLM


@torch.no_grad()
def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Nearest orthogonal matrices of `g` [K, R, C], by a quintic Newton-Schulz iteration.

    Singular values end between about 0.7 and 1.2, which is as good for an optimiser (Jordan, 2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g / (g.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    wide = g.shape[-2] > g.shape[-1]
    if wide:
        x = x.mT
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if wide else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised per matrix. Matrices of one shape are updated as one batch."""

    def __init__(
        self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                grads = []
                for p in params:
                    buf = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buf.lerp_(p.grad, 1 - group["momentum"])
                    grads.append(p.grad.lerp(buf, group["momentum"]))
                update = orthogonalise(torch.stack(grads))
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for p, u in zip(params, update, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(u, alpha=-group["lr"] * scale)


def optimizers(
    model: LoopLM, muon_lr: float, adam_lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """[Muon over the layers' matrices, AdamW over embeddings, head, gate and norms]."""
    matrices, tables, vectors = [], [], []
    for name, p in model.named_parameters():
        if ".layers." in name and p.ndim == 2:
            matrices.append(p)
        elif p.ndim == 2 and "gate" not in name:
            tables.append(p)
        else:
            vectors.append(p)
    adam = torch.optim.AdamW(
        [
            {"params": tables, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=adam_lr,
        betas=(0.9, 0.95),
    )
    return [Muon(matrices, muon_lr, weight_decay=weight_decay), adam]
