"""Both objectives against hand-computed cases, and their gradients against finite differences."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from ouro_runtime.training.objectives import (
    continue_targets,
    exit_log_probs,
    stage1_loss,
    stage2_loss,
)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def column(*probs: float) -> torch.Tensor:
    return torch.tensor([[logit(p)] for p in probs], dtype=torch.float64)


def test_exit_distribution_by_hand() -> None:
    p = exit_log_probs(column(0.2, 0.5, 0.25, 0.9)).exp()[:, 0]
    # 0.2, then 0.8 * 0.5, then 0.4 * 0.25, and the last loop takes the 0.3 that is left.
    torch.testing.assert_close(p, torch.tensor([0.2, 0.4, 0.1, 0.3], dtype=torch.float64))


def test_exit_distribution_sums_to_one_at_extreme_gates() -> None:
    logits = torch.tensor([[80.0, -80.0, 0.0], [-80.0, -80.0, 80.0], [0.0, 0.0, 0.0]])
    log_p = exit_log_probs(logits)
    assert torch.isfinite(log_p).all()
    torch.testing.assert_close(log_p.exp().sum(0), torch.ones(3))


def test_stage1_by_hand() -> None:
    losses = torch.tensor([[2.0], [1.0], [0.5]], dtype=torch.float64)
    gate = column(0.25, 0.5, 0.5)
    p = [0.25, 0.375, 0.375]
    expected = 0.25 * 2.0 + 0.375 * 1.0 + 0.375 * 0.5
    entropy = -sum(x * math.log(x) for x in p)
    assert stage1_loss(losses, gate, 0.1).item() == pytest.approx(expected - 0.1 * entropy)


def test_stage1_without_differences_is_least_at_the_uniform_exit() -> None:
    losses = torch.full((4, 1), 1.5, dtype=torch.float64)
    uniform = column(1 / 4, 1 / 3, 1 / 2, 0.5).requires_grad_()
    value = stage1_loss(losses, uniform, 0.1)
    assert value.item() == pytest.approx(1.5 - 0.1 * math.log(4))
    (grad,) = torch.autograd.grad(value, uniform)
    torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-12, rtol=0)


def test_stage1_gradients() -> None:
    torch.manual_seed(0)
    losses = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    gate = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda a, b: stage1_loss(a, b, 0.1), (losses, gate))


def test_stage1_does_not_use_the_last_gate() -> None:
    losses, gate = torch.rand(3, 2), torch.randn(3, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(stage1_loss(losses, gate, 0.1), gate)
    assert (grad[-1] == 0).all() and (grad[:-1] != 0).all()


def test_continue_targets_by_hand() -> None:
    losses = torch.tensor([[1.0], [0.98], [1.5], [0.4]], dtype=torch.float64)

    def w(gain: float) -> float:
        return 1 / (1 + math.exp(-50 * (gain - 0.005)))

    step = torch.tensor([[w(0.02)], [w(0.0)], [w(1.1)]], dtype=torch.float64)
    torch.testing.assert_close(continue_targets(losses, "paper"), step)
    torch.testing.assert_close(continue_targets(losses, "shifted"), step)
    rest = torch.tensor([[w(0.6)], [w(0.58)], [w(1.1)]], dtype=torch.float64)
    torch.testing.assert_close(continue_targets(losses, "remaining"), rest)


def bce(stay: float, wanted: float) -> float:
    return -(wanted * math.log(stay) + (1 - wanted) * math.log(1 - stay))


@pytest.mark.parametrize(("target", "used"), [("paper", (0.6, 0.9)), ("shifted", (0.3, 0.6))])
def test_stage2_by_hand(target: str, used: tuple[float, float]) -> None:
    losses = torch.tensor([[1.0], [0.99], [0.2]], dtype=torch.float64)
    gate = column(0.3, 0.6, 0.9)
    wanted = [1 / (1 + math.exp(-50 * 0.005)), 1 / (1 + math.exp(-50 * 0.785))]
    expected = sum(bce(1 - lam, w) for lam, w in zip(used, wanted, strict=True)) / 3
    assert stage2_loss(gate, losses, target).item() == pytest.approx(expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(("target", "free"), [("paper", 0), ("shifted", 3), ("remaining", 3)])
def test_stage2_gradients(target: str, free: int) -> None:
    torch.manual_seed(0)
    losses = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    gate = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda g: stage2_loss(g, losses, target), (gate,))  # type: ignore[arg-type]
    value = stage2_loss(gate, losses, target)  # type: ignore[arg-type]
    grad, none = torch.autograd.grad(value, (gate, losses), allow_unused=True)
    assert none is None, "the language model is frozen in Stage II"
    assert (grad[free] == 0).all()
    assert (grad[[t for t in range(4) if t != free]] != 0).all()
