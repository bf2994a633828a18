"""What an adapter must hold of the layers that it changes.

vLLM copies what fits into place: a smaller tensor or a layer that the model does not have it takes
without a word, and what is no number spreads from there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch

from ouro_runtime.model.checkpoint import Shape


class LowRank(Protocol):
    """A [rank, in] and B [out, rank] of a layer, None where the adapter does not have it, and what
    their product is scaled by."""

    rank: int
    scaling: float
    lora_a: torch.Tensor | None
    lora_b: torch.Tensor | None


def check_layers(layers: Mapping[str, LowRank], shapes: Mapping[str, Shape]) -> None:
    """Return if an adapter's `layers` are those of a model whose weights [out, in] are `shapes`.

    Raises:
        ValueError: naming the layer that the model does not have or whose scale is not finite, or
            the tensor that is missing, of another shape than the model and the adapter's rank say,
            or not finite.
    """
    for name, layer in layers.items():
        if name not in shapes:
            raise ValueError(f"{name}: the model has no such layer")
        if not math.isfinite(layer.scaling):
            raise ValueError(f"{name}: lora_alpha over the rank is {layer.scaling}")
        out, into = shapes[name]
        check_tensor(f"{name}.lora_A.weight", layer.lora_a, (layer.rank, into))
        check_tensor(f"{name}.lora_B.weight", layer.lora_b, (out, layer.rank))


def check_tensor(name: str, tensor: torch.Tensor | None, shape: Shape) -> None:
    """ValueError unless it is there, of this shape, and finite."""
    if tensor is None:
        raise ValueError(f"{name} is missing in the adapter")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {tuple(tensor.shape)}, not {shape}")
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} holds what is not a finite number")
