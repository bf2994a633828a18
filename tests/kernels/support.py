"""Comparison and inputs shared by the kernel tests."""

import copy
import importlib
from typing import Any

import torch

from ouro_kernels import CacheTable

NORM_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Relative and absolute, by the dtype that was stored. One place, the same for every machine.
TOLERANCE = {
    torch.float32: (1e-5, 1e-5),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1.6e-2, 1e-2),
    torch.float8_e4m3fn: (0.13, 2e-3),
}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Equal within the dtype's tolerance; NaN equals NaN only (poison left alone on both sides)."""
    assert actual.shape == expected.shape, f"{what}: {actual.shape} against {expected.shape}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} against {expected.dtype}"
    if actual.is_floating_point():
        rtol, atol = TOLERANCE[actual.dtype]
        got, want = actual.float().cpu(), expected.float().cpu()
        bad = ~torch.isclose(got, want, rtol=rtol, atol=atol, equal_nan=True)
    else:
        got, want = actual.cpu(), expected.cpu()
        bad = got != want
    where = bad.nonzero()
    if len(where):
        lines = [
            f"  {tuple(at)}: got {got[tuple(at)].item()}, want {want[tuple(at)].item()}"
            for at in where[:8].tolist()
        ]
        message = f"{what}: {len(where)} of {bad.numel()} differ, first at\n"
        raise AssertionError(message + "\n".join(lines))


def copy_of(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, CacheTable):
        return CacheTable([c.clone() for c in value.k_caches], [c.clone() for c in value.v_caches])
    return copy.copy(value)


def _compare(actual: Any, expected: Any, what: str) -> None:
    if isinstance(actual, torch.Tensor):
        assert_close(actual, expected, what)
    elif isinstance(actual, CacheTable):
        for name in ("k_caches", "v_caches"):
            pairs = zip(getattr(actual, name), getattr(expected, name), strict=True)
            for layer, (left, right) in enumerate(pairs):
                assert_close(left, right, f"{what}.{name}[{layer}]")
    elif isinstance(actual, tuple):
        for index, (left, right) in enumerate(zip(actual, expected, strict=True)):
            _compare(left, right, f"{what}[{index}]")
    else:
        assert actual == expected, what


def check_against_reference(op: str, name: str, **kwargs: Any) -> Any:
    """Run op `name` and its reference on equal inputs; compare results and every argument after.

    So an argument that only one of the two writes to is found as well. Returns the op's result.
    """
    reference = getattr(importlib.import_module(f"ouro_kernels.{op}.reference"), name)
    twin = {key: copy_of(value) for key, value in kwargs.items()}
    result = getattr(importlib.import_module("ouro_kernels"), name)(**kwargs)
    _compare(result, reference(**twin), "result")
    for key, value in kwargs.items():
        _compare(value, twin[key], key)
    return result


def strided_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, rows (and heads) not adjacent in memory, last dimension dense."""
    wide = tensor.new_zeros(*tensor.shape[:-1], tensor.shape[-1] + 16)
    view = wide[..., : tensor.shape[-1]]
    view.copy_(tensor)
    assert tensor.numel() <= tensor.shape[-1] or not view.is_contiguous()
    return view


def paged_caches(
    pages: int,
    block_size: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    layout: str = "HND",
) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer's K and V full of NaN: vLLM's shared page ("HND", "NHD") or "split" tensors."""
    if layout == "split":
        shape = (2, pages, block_size, heads, head_dim)
        k, v = torch.zeros(shape, dtype=dtype, device=device).unbind(0)
    else:
        inner = (heads, block_size) if layout == "HND" else (block_size, heads)
        raw = torch.zeros(pages, *inner, 2 * head_dim, dtype=dtype, device=device)
        raw = raw.transpose(1, 2) if layout == "HND" else raw
        k, v = raw.split(head_dim, dim=-1)
    for cache in (k, v):
        if dtype == torch.float8_e4m3fn:
            cache.view(torch.uint8).fill_(0x7F)
        else:
            cache.fill_(float("nan"))
    return k, v


def as_fp8(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn)
