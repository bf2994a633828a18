"""Gate arithmetic and exit rules against hand-computed cases."""

import numpy as np
import pytest
import torch

from ouro_runtime.exit.gate import halt_probability, survive
from ouro_runtime.exit.policy import exit_mask


def test_survival_is_the_product_of_not_halting() -> None:
    survival = np.ones(1, np.float32)
    for halt in (0.5, 0.2, 0.1):
        survival = survive(survival, np.array([halt], np.float32))
    assert survival.dtype == np.float32
    assert survival.item() == pytest.approx(0.5 * 0.8 * 0.9)


def test_the_gate_computes_in_float32_whatever_the_model_is_in() -> None:
    hidden = torch.randn(3, 64, dtype=torch.bfloat16)
    weight, bias = torch.randn(1, 64).bfloat16(), torch.tensor([0.3]).bfloat16()
    out = halt_probability(hidden, weight, bias)
    exact = torch.sigmoid(hidden.double() @ weight.double().T + bias.double()).squeeze(-1)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-6)


def decide(cdf, depth, threshold, low=1, high=4, loops=4) -> bool:
    survival = np.array([1 - cdf], np.float32)
    others = (np.array([value]) for value in (depth, threshold, low, high))
    return bool(exit_mask(survival, *others, loops).item())


@pytest.mark.parametrize(
    ("cdf", "depth", "threshold", "low", "high", "leaves"),
    [
        (0.5, 1, 0.5, 1, 4, True),
        (0.49, 1, 0.5, 1, 4, False),
        (0.9, 1, 0.5, 2, 4, False),
        (0.9, 2, 0.5, 2, 4, True),
        (0.0, 2, 0.9, 1, 2, True),
        (0.0, 4, 0.9, 1, 4, True),
        (1.0, 1, 1.0, 1, 4, False),
        (0.0, 1, 0.0, 1, 4, True),
    ],
)
def test_exit_rule(cdf, depth, threshold, low, high, leaves) -> None:
    assert decide(cdf, depth, threshold, low, high) is leaves
