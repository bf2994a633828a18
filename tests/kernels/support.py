"""Comparison and inputs shared by the kernel tests."""

import copy
import importlib
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
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


FENCE = 4096
"""Elements before and after a fenced tensor: more than any kernel's tile or page in these tests."""


@dataclass
class Fenced:
    """A tensor in memory of its own; `raw` is that memory, `outside` what is none of the tensor."""

    inside: torch.Tensor
    raw: torch.Tensor
    before: torch.Tensor
    outside: torch.Tensor

    def check(self, what: str) -> None:
        """Nothing was written before, after or between the tensor's elements."""
        changed = (self.raw != self.before).view(-1, self.inside.itemsize).any(-1)
        strays = (changed & self.outside).nonzero().flatten() - FENCE
        assert not len(strays), f"{what}: written outside of it, at elements {strays[:8].tolist()}"


def _span(tensor: torch.Tensor) -> int:
    """Elements of memory from the first to the last."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() else 0


def fenced(tensor: torch.Tensor) -> Fenced:
    """The same values with the same strides, in the middle of memory that is known."""
    length = _span(tensor) + 2 * FENCE
    raw = (torch.arange(length * tensor.itemsize, device=tensor.device) % 251).byte()
    before = raw.clone()
    inside = raw.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), FENCE)
    inside.copy_(tensor)
    outside = torch.ones(length, dtype=torch.bool, device=tensor.device)
    outside.as_strided(tensor.shape, tensor.stride(), FENCE).fill_(False)
    return Fenced(inside, raw, before, outside)


def _can_be_fenced(tensor: torch.Tensor) -> bool:
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    overlaps = any(stride == 0 and size > 1 for size, stride in steps)
    return not overlaps and _span(tensor) < 2**24


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, CacheTable):
        yield from (*value.k_caches, *value.v_caches)


def check_against_reference(op: str, name: str, **kwargs: Any) -> Any:
    """Run op `name` and its reference on equal inputs; compare results and every argument after.

    So an argument that only one of the two writes to is found as well; and, the op being given
    fenced copies, a write to anything else. Afterwards `kwargs` hold what the op left. Returns the
    op's result.
    """
    reference = getattr(importlib.import_module(f"ouro_kernels.{op}.reference"), name)
    twin = {key: copy_of(value) for key, value in kwargs.items()}
    fences: dict[str, list[Fenced]] = {}
    given = dict(kwargs)
    for key, value in kwargs.items():
        tensors = list(_tensors(value))
        if tensors and all(map(_can_be_fenced, tensors)):
            fences[key] = [fenced(tensor) for tensor in tensors]
            copies = [fence.inside for fence in fences[key]]
            half = len(copies) // 2
            table = isinstance(value, CacheTable)
            given[key] = CacheTable(copies[:half], copies[half:]) if table else copies[0]
    result = getattr(importlib.import_module("ouro_kernels"), name)(**given)
    _compare(result, reference(**twin), "result")
    for key, value in given.items():
        _compare(value, twin[key], key)
        for tensor, fence in zip(_tensors(kwargs[key]), fences.get(key, ()), strict=False):
            fence.check(key)
            tensor.copy_(fence.inside)
    return result


def strided_rows(tensor: torch.Tensor, gap: int = 16) -> torch.Tensor:
    """The same values, rows (and heads) `gap` apart in memory, last dimension dense."""
    wide = tensor.new_zeros(*tensor.shape[:-1], tensor.shape[-1] + gap)
    view = wide[..., : tensor.shape[-1]]
    view.copy_(tensor)
    assert tensor.numel() <= tensor.shape[-1] or not view.is_contiguous()
    return view


class Vast:
    """16 GiB of zeros; without a GPU only what is written to takes memory."""

    APART = 2**30
    """Elements from one to the next of three, so that the third lies at 2**31."""

    BYTES = 2**34 + 2**26

    def __init__(self, device: torch.device) -> None:
        size = self.BYTES
        if device.type == "cpu":
            flags = (
                mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
            )  # MAP_NORESERVE, nameless in 3.11
            self._raw = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=torch.uint8)
        else:
            self._raw = torch.zeros(size, dtype=torch.uint8, device=device)
        self._placed = 0

    def place(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """The same values, those of dimension `dim` `APART` from each other.

        In the middle, so that an offset that wrapped to -2**31 is an address as well.
        """
        assert tensor.shape[dim] == 3
        strides = list(torch.empty_like(tensor, device="meta").contiguous().stride())
        strides[dim] = self.APART
        self._placed += 2**20
        start = 2 * self.APART + self._placed // tensor.itemsize
        view = self._raw.view(tensor.dtype).as_strided(tensor.shape, strides, start)
        view.copy_(tensor)
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
    """One layer's K and V full of NaN.

    vLLM's shared page ("HND", "NHD"), "split" tensors, or "unlike": no stride of K is one of V.
    """
    if layout == "unlike":
        shape = (pages, block_size, heads, head_dim + 16)
        k = torch.zeros(shape, dtype=dtype, device=device)[..., :head_dim]
        shape = (pages, heads + 1, block_size + 1, 2 * head_dim)
        v = torch.zeros(shape, dtype=dtype, device=device).transpose(1, 2)
        v = v[:, :block_size, :heads, :head_dim]
    elif layout == "split":
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


def pages_by_loop(loops: int, blocks: int, device: torch.device) -> torch.Tensor:
    """[T, 1, blocks] of one request; its first block at loop 0 is page 0."""
    table = torch.randperm(loops * blocks - 1, device=device) + 1
    first = torch.zeros(1, dtype=table.dtype, device=device)
    return torch.cat((first, table)).int().view(loops, 1, blocks)


def as_fp8(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn)
