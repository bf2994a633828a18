"""The one place where a kernel is launched, so that aot.py can see every launch without a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

# Said outright, because Triton's default changes with its version and the roundings with it.
OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Launch:
    """A kernel and what it was called with: positional arguments, constexprs, options."""

    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


_sink: list[Launch] | None = None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect launches instead of running them. Not for use from several threads."""
    global _sink
    previous, _sink = _sink, []
    try:
        yield _sink
    finally:
        _sink = previous


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    num_warps: int = 4,
    num_stages: int = 3,
    **constants: Any,
) -> None:
    """Run `kernel` over `grid`; an empty grid (a batch of no rows) is no launch at all."""
    if _sink is not None:
        _sink.append(Launch(kernel, args, constants, num_warps, num_stages))
        return
    if 0 in grid:
        return
    kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **OPTIONS, **constants)


def pow2(value: int) -> int:
    """The smallest power of two that is at least `value` (Triton's tile sizes)."""
    return 1 << max(value - 1, 0).bit_length()


def as_bytes(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A bool tensor viewed as bytes, which Triton loads and stores without a bit-width cast."""
    return None if mask is None else mask.view(torch.uint8)
