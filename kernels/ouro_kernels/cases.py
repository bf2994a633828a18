"""One realistic call per op and variant: what aot.py compiles and the benchmark times."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ouro_kernels.standin_fill import CacheTable

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Shape:
    """The sizes of a model and of a pass."""

    rows: int
    context: int
    hidden: int = 2048
    q_heads: int = 16
    kv_heads: int = 16
    head_dim: int = 128
    layers: int = 24
    vocab: int = 49152
    loops: int = 4
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype = torch.bfloat16

    @property
    def blocks_per_row(self) -> int:
        return -(-self.context // self.block_size)

    @property
    def blocks(self) -> int:
        return max(self.rows * self.blocks_per_row, 1)

    @property
    def kv_row_bytes(self) -> int:
        """K or V of one position in one layer and loop."""
        return self.kv_heads * self.head_dim * self.kv_dtype.itemsize


@dataclass(frozen=True)
class Case:
    """`make(device)` gives fresh keyword arguments for `ouro_kernels.<function>`.

    `bytes` is what the call must move through device memory at the least: each input read once,
    each output written once.
    """

    op: str
    function: str
    variant: str
    shape: Shape
    bytes: int
    make: Callable[[torch.device], dict[str, Any]]


def _randn(shape: Shape, device: torch.device, *size: int) -> torch.Tensor:
    return torch.randn(*size, device=device).to(shape.dtype)


def _vector(shape: Shape, device: torch.device, value: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((shape.rows,), value, dtype=dtype, device=device)


def _mixed_loops(shape: Shape, device: torch.device, top: int) -> torch.Tensor:
    return (torch.arange(shape.rows, device=device) % top).int()


def _table(shape: Shape, device: torch.device) -> torch.Tensor:
    """[T, rows, blocks of a row]: a page for each."""
    size = (shape.loops, shape.rows, shape.blocks_per_row)
    return (
        torch.randperm(shape.loops * shape.rows * shape.blocks_per_row, device=device)
        .int()
        .view(size)
    )


def _caches(shape: Shape, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V as vLLM lays a layer out: [pages, heads, block_size, 2 D], transposed and split."""
    size = (shape.blocks * shape.loops, shape.kv_heads, shape.block_size, 2 * shape.head_dim)
    raw = torch.randn(size, device=device).to(shape.kv_dtype).transpose(1, 2)
    k, v = raw.split(shape.head_dim, dim=-1)
    return k, v


def _scales(shape: Shape, device: torch.device) -> dict[str, torch.Tensor]:
    if shape.kv_dtype != FP8:
        return {}
    return {name: torch.full((1,), 0.5, device=device) for name in ("k_scale", "v_scale")}


def _place(shape: Shape, device: torch.device, loop: torch.Tensor) -> dict[str, torch.Tensor]:
    """Rows at the last position of a context, and where that lies."""
    table, last = _table(shape, device), shape.context - 1
    pages = table[loop.long(), torch.arange(shape.rows, device=device), -1].long()
    return {
        "positions": _vector(shape, device, last, torch.int64),
        "slot_mapping": pages * shape.block_size + last % shape.block_size,
        "block_table": table,
        "loop": loop,
    }


def _norms(shape: Shape) -> Iterator[Case]:
    state = shape.rows * shape.hidden * shape.dtype.itemsize
    weight = shape.hidden * shape.dtype.itemsize
    for function, weights, states, extra in (
        ("rms_norm", ("weight",), 2, ()),
        ("sandwich_norm", ("post_weight", "pre_weight"), 4, ("residual",)),
        ("loop_norm", ("post_weight", "final_weight"), 3, ("residual",)),
        ("loop_norm", ("post_weight", "final_weight", "pre_weight"), 4, ("residual",)),
    ):

        def make(device, weights=weights, extra=extra):
            names = ("x", *extra)
            kwargs = {name: _randn(shape, device, shape.rows, shape.hidden) for name in names}
            kwargs |= {name: _randn(shape, device, shape.hidden) for name in weights}
            return kwargs | {"eps": 1e-6}

        variant = "pre" if len(weights) == 3 else ""
        moved = states * state + len(weights) * weight
        yield Case("sandwich_norm", function, variant, shape, moved, make)


def _exit_gate(shape: Shape) -> Iterator[Case]:
    def make(device, options=False):
        flags = {name: _vector(shape, device, 1, torch.bool) for name in ("run_all", "active")}
        flags["history"] = torch.ones(shape.rows, shape.loops, device=device)
        flags["deepest"] = _vector(shape, device, shape.loops, torch.int32)
        return {
            "h": _randn(shape, device, shape.rows, shape.hidden),
            "weight": _randn(shape, device, shape.hidden) / shape.hidden**0.5,
            "bias": _randn(shape, device, 1),
            "survival": _vector(shape, device, 1, torch.float32),
            "depth": _vector(shape, device, 0, torch.int32),
            "loop": _mixed_loops(shape, device, shape.loops),
            "threshold": _vector(shape, device, 0.0, torch.float32),
            "min_loops": _vector(shape, device, 2, torch.int32),
            "max_loops": _vector(shape, device, shape.loops, torch.int32),
            "total_loops": shape.loops,
        } | (flags if options else {})

    state = (shape.rows + 1) * shape.hidden * shape.dtype.itemsize
    moved = state + shape.rows * (8 + 8 + 4 + 4 + 8 + 2)
    yield Case("exit_gate", "exit_gate", "", shape, moved, make)
    yield Case(
        "exit_gate",
        "exit_gate",
        "options",
        shape,
        moved + 10 * shape.rows,
        lambda device: make(device, options=True),
    )


def _rope_kv_write(shape: Shape) -> Iterator[Case]:
    def make(device, fill=False):
        loop = _mixed_loops(shape, device, shape.loops)
        k, v = _caches(shape, device)
        width = (shape.q_heads + 2 * shape.kv_heads) * shape.head_dim
        place = _place(shape, device, loop)
        kwargs = {
            "qkv": _randn(shape, device, shape.rows, width),
            "cos_sin": _randn(shape, device, shape.context, shape.head_dim),
            "positions": place.pop("positions"),
            "slot_mapping": place.pop("slot_mapping"),
            "k_cache": k,
            "v_cache": v,
        } | _scales(shape, device)
        return kwargs | (place | {"fill_copies": shape.loops - 1 - loop} if fill else {})

    heads = 2 * shape.q_heads + 2 * shape.kv_heads
    row = (heads + 1) * shape.head_dim * shape.dtype.itemsize + 2 * shape.kv_row_bytes + 16
    moved = shape.rows * row
    loops = range(shape.rows)
    copies = sum(shape.loops - 1 - row % shape.loops for row in loops) * 2 * shape.kv_row_bytes
    yield Case("rope_kv_write", "rope_kv_write", "", shape, moved, make)
    yield Case(
        "rope_kv_write",
        "rope_kv_write",
        "fill",
        shape,
        moved + copies + 4 * shape.rows,
        lambda device: make(device, fill=True),
    )


def _attention(shape: Shape, splits: int | None, variant: str) -> Iterator[Case]:
    def make(device):
        k, v = _caches(shape, device)
        return {
            "q": _randn(shape, device, shape.rows, shape.q_heads, shape.head_dim),
            "k_cache": k,
            "v_cache": v,
            "block_table": _table(shape, device),
            "loop": _mixed_loops(shape, device, shape.loops),
            "seq_lens": _vector(shape, device, shape.context, torch.int32),
            "row_to_request": torch.arange(shape.rows, device=device, dtype=torch.int32),
            "scale": shape.head_dim**-0.5,
            "num_splits": splits,
        } | _scales(shape, device)

    queries = 2 * shape.q_heads * shape.head_dim * shape.dtype.itemsize
    pages = 2 * shape.context * shape.kv_row_bytes + 4 * shape.blocks_per_row
    moved = shape.rows * (queries + pages + 12)
    name = "loop_decode_attention"
    yield Case(name, name, variant, shape, moved, make)


def _standin_fill(shape: Shape) -> Iterator[Case]:
    top = max(shape.loops - 1, 1)

    def make(device):
        loop = _mixed_loops(shape, device, top)
        layers = [_caches(shape, device) for _ in range(shape.layers)]
        return {
            "table": CacheTable([k for k, _ in layers], [v for _, v in layers]),
            "copies": (shape.loops - 1 - loop) * (torch.arange(shape.rows, device=device) % 2 == 0),
        } | _place(shape, device, loop)

    leaving = range(0, shape.rows, 2)
    # Each leaving row: one read, and a write for each loop it did not run.
    touched = sum(shape.loops - row % top for row in leaving)
    moved = touched * shape.layers * 2 * shape.kv_row_bytes + 13 * shape.rows
    yield Case("standin_fill", "standin_fill", "", shape, moved, make)


def _next_pass(shape: Shape) -> Iterator[Case]:
    def make(device, options=False):
        exits = torch.arange(shape.rows, device=device) % 2 == 0
        kwargs = {
            "hidden": _randn(shape, device, shape.rows, shape.hidden),
            "tokens": torch.arange(shape.rows, device=device) * 7 % shape.vocab,
            "embedding": _randn(shape, device, shape.vocab, shape.hidden),
            "exit_mask": exits,
            "active": _vector(shape, device, 1, torch.bool),
            "loop": _vector(shape, device, 1, torch.int32),
            "positions": _vector(shape, device, shape.context - 2, torch.int64),
            "survival": _vector(shape, device, 0.5, torch.float32),
            "depth": _vector(shape, device, 0, torch.int32),
            "block_table": _table(shape, device),
            "slot_mapping": _vector(shape, device, -1, torch.int64),
            "seq_lens": _vector(shape, device, 0, torch.int32),
            "block_size": shape.block_size,
        }
        if options:
            kwargs |= {
                "finished": _vector(shape, device, 0, torch.bool),
                "position_limit": _vector(shape, device, shape.context, torch.int64),
                "row_to_request": torch.arange(shape.rows, device=device, dtype=torch.int32),
                "run_all": _vector(shape, device, 0, torch.bool),
                "fill_copies": _vector(shape, device, 0, torch.int32),
                "deepest": _vector(shape, device, shape.loops, torch.int32),
            }
        return kwargs

    embedded = (shape.rows + 1) // 2 * 2 * shape.hidden * shape.dtype.itemsize
    state = shape.rows * (8 + 2 + 8 + 16 + 4 + 4 + 8 + 4 + 4)
    yield Case("next_pass", "next_pass", "", shape, embedded + state, make)
    yield Case(
        "next_pass",
        "next_pass",
        "options",
        shape,
        embedded + state + shape.rows * 22,
        lambda device: make(device, options=True),
    )


def _read_out(shape: Shape) -> Iterator[Case]:
    def make(device, reads=1):
        return {
            "hidden": _randn(shape, device, shape.rows, shape.hidden),
            "weight": _randn(shape, device, shape.vocab, shape.hidden) / shape.hidden**0.5,
            "read_mask": _vector(shape, device, reads, torch.bool),
        }

    size = shape.dtype.itemsize
    logits = shape.rows * (shape.vocab * size + 1)
    weight = min(shape.rows, 1) * shape.vocab * shape.hidden * size
    states = shape.rows * shape.hidden * size
    yield Case("read_out", "read_out", "", shape, logits + weight + states, make)
    yield Case("read_out", "read_out", "nobody", shape, logits, lambda device: make(device, 0))


def cases(shape: Shape) -> Iterator[Case]:
    """Every op at `shape`, with the fp8 and grouped-query forms of those that have them."""
    fp8 = replace(shape, kv_dtype=FP8)
    grouped = replace(shape, kv_heads=max(shape.q_heads // 4, 1))
    yield from _norms(shape)
    yield from _exit_gate(shape)
    yield from _rope_kv_write(shape)
    for case in _rope_kv_write(fp8):
        yield replace(case, variant=f"{case.variant}+fp8".lstrip("+"))
    yield from _attention(shape, None, "")
    yield from _attention(shape, 1, "one split")
    yield from _attention(fp8, None, "fp8")
    yield from _attention(grouped, None, "gqa")
    yield from _attention(replace(grouped, kv_dtype=FP8), None, "gqa+fp8")
    yield from _standin_fill(shape)
    yield from _next_pass(shape)
    yield from _read_out(shape)
