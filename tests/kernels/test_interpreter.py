import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from ouro_kernels import _interpreter
from tests.kernels.conftest import ON_GPU

pytestmark = pytest.mark.skipif(ON_GPU, reason="kernels are compiled here")

TARGETS = [
    (tl.bfloat16, torch.bfloat16, torch.int16, 0xFFFF),
    (tl.float8e4nv, torch.float8_e4m3fn, torch.uint8, 0xFF),
]


def _bits(function, values, dtype):
    return np.asarray(function(values, tl.float32, dtype, None)).reshape(-1).tolist()


@pytest.mark.parametrize(("dtype", "torch_dtype", "bits", "mask"), TARGETS)
def test_conversions_round_to_nearest_even(dtype, torch_dtype, bits, mask):
    values = np.linspace(-440, 440, 999, dtype=np.float32) ** 3 / 440**2
    expected = torch.from_numpy(values).to(torch_dtype).view(bits).tolist()
    assert _bits(_interpreter.convert_float, values, dtype) == [each & mask for each in expected]


def _square_kernel(x, out):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tile = tl.load(x + at)
    tl.store(out + at, tl.dot(tile, tile))


def _square(x):
    out = torch.empty(16, 16)
    triton.jit(_square_kernel)[(1,)](x, out)
    return out


def test_a_product_of_bfloat16_tiles_is_one_of_numbers():
    x = torch.randn(16, 16).bfloat16()
    assert torch.allclose(_square(x), x.float() @ x.float(), rtol=1e-5, atol=1e-5)


def test_the_corrections_are_still_needed(monkeypatch):
    """Fails when Triton does these by itself: then the corrections can go."""
    value = np.array([1.0 + 2**-8 + 2**-9], dtype=np.float32)
    assert _bits(_interpreter.original_convert, value, tl.bfloat16) == [0x3F80]
    assert _bits(_interpreter.convert_float, value, tl.bfloat16) == [0x3F81]
    builder = _interpreter.interpreter.InterpreterBuilder
    monkeypatch.setattr(builder, "create_dot", _interpreter.original_dot)
    x = torch.randn(16, 16).bfloat16()
    assert not torch.allclose(_square(x), x.float() @ x.float(), rtol=0.1, atol=0.1)
