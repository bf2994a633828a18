"""Gate arithmetic and exit rules against hand-computed cases."""

import numpy as np
import pytest
import torch

from ouro_runtime.exit.gate import halt_probability, survive
from ouro_runtime.exit.policy import delta_fires, exit_mask, gate_fires, margin_fires
from ouro_runtime.exit.readings import change, margin


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
    fires = gate_fires(np.array([1 - cdf], np.float32), np.array([threshold], np.float32))
    return bool(exit_mask(fires, *(np.array([v]) for v in (depth, low, high)), loops).item())


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


@pytest.mark.parametrize(
    ("fires", "reading", "threshold", "leaves"),
    [
        (margin_fires, 0.5, 0.5, True),
        (margin_fires, 0.49, 0.5, False),
        (margin_fires, 1.0, 1.0, False),
        (margin_fires, 0.0, 0.0, True),
        (delta_fires, 0.5, 0.5, True),
        (delta_fires, 0.51, 0.5, False),
        (delta_fires, 0.0, 0.0, False),
        (delta_fires, 2.0, 2.0, True),
    ],
)
def test_a_rule_beside_the_gate_fires_at_its_threshold_and_never_when_off(
    fires, reading, threshold, leaves
) -> None:
    pair = (np.array([value], np.float32) for value in (reading, threshold))
    assert bool(fires(*pair).item()) is leaves


def test_the_margin_is_the_gap_of_the_two_largest_probabilities() -> None:
    shares = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    read = margin(shares.log().bfloat16() + 7)
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, [0.3, 0.0, 1.0], atol=1e-2)
    assert margin(torch.zeros(1, 1)).tolist() == [1.0]


def test_the_change_is_relative_to_the_state_it_led_to() -> None:
    before = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    after = torch.tensor([[3.0, 4.0], [2.0, 0.0], [1.0, 1.0]])
    np.testing.assert_allclose(change(before, after), [0.8, 2**0.5, 0.0], rtol=1e-6)
    assert change(before.bfloat16(), after.bfloat16()).dtype == np.float32
