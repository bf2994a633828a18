import pytest
import torch

import ouro_kernels
from ouro_kernels import rms_norm, sandwich_norm
from ouro_kernels.sandwich_norm import reference
from tests.kernels.support import NORM_DTYPES, check_against_reference, strided_rows

EPS = 1e-6


def _rows(rows, size, dtype, device):
    x = torch.randn(rows, size, device=device) * 3 + 0.5
    return x.to(dtype)


def _weight(size, dtype, device):
    return (torch.rand(size, device=device) + 0.5).to(dtype)


@pytest.mark.parametrize("dtype", NORM_DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(0, 64), (1, 111), (7, 123), (3, 256)])
@pytest.mark.parametrize("strided", [False, True])
class TestEveryForm:
    def inputs(self, rows, size, dtype, strided, device, *weights):
        x, other = (_rows(rows, size, dtype, device) for _ in range(2))
        if strided:
            x, other = strided_rows(x), strided_rows(other, gap=32)
        return {"x": x} | {name: _weight(size, dtype, device) for name in weights}, other

    def test_plain_norm(self, rows, size, dtype, strided, device):
        kwargs, out = self.inputs(rows, size, dtype, strided, device, "weight")
        check_against_reference("sandwich_norm", "rms_norm", eps=EPS, **kwargs)
        check_against_reference("sandwich_norm", "rms_norm", eps=EPS, out=out, **kwargs)

    def test_sandwich(self, rows, size, dtype, strided, device):
        names = ("post_weight", "pre_weight")
        kwargs, residual = self.inputs(rows, size, dtype, strided, device, *names)
        check_against_reference(
            "sandwich_norm", "sandwich_norm", residual=residual, eps=EPS, **kwargs
        )

    def test_loop_boundary(self, rows, size, dtype, strided, device):
        names = ("post_weight", "final_weight")
        kwargs, residual = self.inputs(rows, size, dtype, strided, device, *names)
        check_against_reference("sandwich_norm", "loop_norm", residual=residual, eps=EPS, **kwargs)
        kwargs["pre_weight"] = _weight(size, dtype, device)
        check_against_reference("sandwich_norm", "loop_norm", residual=residual, eps=EPS, **kwargs)


def test_eps_keeps_small_rows_small_and_rows_of_zeros_zero(device):
    x = torch.randn(3, 64, device=device) * torch.tensor([[1e-4], [1e-3], [0.0]], device=device)
    weight = _weight(64, torch.float32, device)
    check_against_reference("sandwich_norm", "rms_norm", x=x, weight=weight, eps=EPS)
    assert torch.equal(rms_norm(x, weight, EPS)[2], torch.zeros(64, device=device))


def test_output_may_be_the_input(device):
    x = _rows(5, 111, torch.float32, device)
    weight = _weight(111, torch.float32, device)
    expected = rms_norm(x, weight, EPS)
    assert rms_norm(x, weight, EPS, out=x) is x
    assert torch.equal(x, expected)


def test_rounds_where_the_released_model_rounds(device):
    """Normalise in fp32, cast, then multiply: bit for bit, not only within tolerance."""
    x = torch.full((1, 64), 3.0, dtype=torch.bfloat16, device=device)
    x[0, 0] = 1.0
    weight = torch.full((64,), 1.0078125, dtype=torch.bfloat16, device=device)
    normed = (x.float() * torch.rsqrt(x.float().pow(2).mean() + EPS)).to(torch.bfloat16)
    assert torch.equal(rms_norm(x, weight, EPS), weight * normed)


FORMS = {
    "rms_norm": ("weight",),
    "sandwich_norm": ("post_weight", "pre_weight"),
    "loop_norm": ("post_weight", "final_weight", "pre_weight"),
}


def _call(function, size, dtype, device, scale):
    kwargs = {name: _weight(size, dtype, device) for name in FORMS[function]}
    for name in ("x", "residual")[: len(kwargs)]:
        kwargs[name] = (torch.randn(3, size, device=device) * scale).to(dtype)
    return kwargs


@pytest.mark.parametrize("function", FORMS)
def test_squares_beyond_half_precision(function, device):
    kwargs = _call(function, 111, torch.float16, device, 2000.0)
    check_against_reference("sandwich_norm", function, eps=EPS, **kwargs)


@pytest.mark.parametrize("function", FORMS)
def test_every_step_is_rounded(function, device):
    """Bit for bit what the reference makes of numbers whose squares add up without rounding.

    Compiled, the reciprocal of a root is the GPU's, whose last bit may differ; now and then that
    shows in a rounded number.
    """

    def same(left, right):
        equal = (left == right).float().mean().item()
        return equal == 1.0 if device.type == "cpu" else equal > 0.98

    kwargs = _call(function, 128, torch.bfloat16, device, 5.0)
    for name in ("x", "residual"):
        if name in kwargs:
            kwargs[name] = kwargs[name].round()
    twin = {name: value.clone() for name, value in kwargs.items()}
    result = getattr(ouro_kernels, function)(**kwargs, eps=EPS)
    assert same(result, getattr(reference, function)(**twin, eps=EPS))
    if "residual" in kwargs:
        assert same(kwargs["residual"], twin["residual"])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", {"x": torch.zeros(4)}),
        ("residual", {"residual": torch.zeros(4, 9)}),
        ("residual", {"residual": torch.zeros(4, 8, dtype=torch.float16)}),
        ("post_weight", {"post_weight": torch.zeros(16)[::2]}),
        ("pre_weight", {"pre_weight": torch.zeros(7)}),
        ("pre_weight", {"pre_weight": torch.zeros(8, device="meta")}),
        ("out", {"out": torch.zeros(8, 4).t()}),
    ],
)
def test_a_bad_argument_is_named(name, change):
    good = {"x": torch.zeros(4, 8), "residual": torch.zeros(4, 8)}
    good |= {"post_weight": torch.zeros(8), "pre_weight": torch.zeros(8)}
    with pytest.raises(ValueError, match=f"^{name}: "):
        sandwich_norm(**(good | change), eps=EPS)
