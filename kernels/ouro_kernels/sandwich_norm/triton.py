"""One program per row; the row stays in registers from the first load to the last store."""

import torch
import triton
import triton.language as tl

from ouro_kernels._launch import launch, pow2


@triton.jit
def _norm(x, weight, size, eps, dtype: tl.constexpr):
    """fp32 in and out, but rounded to dtype where the released model rounds."""
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)
    return ((x * scale).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)


@triton.jit
def _rms_norm_kernel(x, weight, out, x_stride, out_stride, size, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    mask = col < size
    dtype: tl.constexpr = out.dtype.element_ty
    w = tl.load(weight + col, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + col, _norm(x, w, size, eps, dtype).to(dtype), mask=mask)


@triton.jit
def _sandwich_kernel(
    x,
    residual,
    post_weight,
    pre_weight,
    out,
    x_stride,
    residual_stride,
    out_stride,
    size,
    eps,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    mask = col < size
    dtype: tl.constexpr = residual.dtype.element_ty
    post = tl.load(post_weight + col, mask=mask, other=0.0).to(tl.float32)
    pre = tl.load(pre_weight + col, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
    stream = residual + row * residual_stride + col
    r = tl.load(stream, mask=mask, other=0.0).to(tl.float32)
    r = (r + _norm(x, post, size, eps, dtype)).to(dtype)
    tl.store(stream, r, mask=mask)
    y = _norm(r.to(tl.float32), pre, size, eps, dtype)
    tl.store(out + row * out_stride + col, y.to(dtype), mask=mask)


@triton.jit
def _loop_kernel(
    x,
    residual,
    post_weight,
    final_weight,
    pre_weight,
    out,
    x_stride,
    residual_stride,
    out_stride,
    size,
    eps,
    HAS_PRE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    mask = col < size
    dtype: tl.constexpr = residual.dtype.element_ty
    post = tl.load(post_weight + col, mask=mask, other=0.0).to(tl.float32)
    final = tl.load(final_weight + col, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
    stream = residual + row * residual_stride + col
    r = tl.load(stream, mask=mask, other=0.0).to(tl.float32)
    r = (r + _norm(x, post, size, eps, dtype)).to(dtype).to(tl.float32)
    h = _norm(r, final, size, eps, dtype)
    tl.store(stream, h.to(dtype), mask=mask)
    if HAS_PRE:
        pre = tl.load(pre_weight + col, mask=mask, other=0.0).to(tl.float32)
        y = _norm(h, pre, size, eps, dtype)
        tl.store(out + row * out_stride + col, y.to(dtype), mask=mask)


def _tile(size: int) -> dict[str, int]:
    # Eight elements a thread: one 16-byte access each at 16 bits.
    block = pow2(size)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 16)}


def _output(x: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out


def rms_norm(x, weight, eps, out=None):
    out = _output(x, out)
    rows, size = x.shape
    args = (x, weight, out, x.stride(0), out.stride(0), size, eps)
    launch(_rms_norm_kernel, (rows,), *args, **_tile(size))
    return out


def sandwich_norm(x, residual, post_weight, pre_weight, eps, out=None):
    out = _output(x, out)
    rows, size = x.shape
    strides = (x.stride(0), residual.stride(0), out.stride(0))
    args = (x, residual, post_weight, pre_weight, out, *strides, size, eps)
    launch(_sandwich_kernel, (rows,), *args, **_tile(size))
    return out


def loop_norm(x, residual, post_weight, final_weight, eps, pre_weight=None, out=None):
    has_pre = pre_weight is not None
    out = _output(x, out) if has_pre else None
    rows, size = x.shape
    strides = (x.stride(0), residual.stride(0), out.stride(0) if has_pre else 0)
    args = (x, residual, post_weight, final_weight, pre_weight, out, *strides, size, eps)
    launch(_loop_kernel, (rows,), *args, HAS_PRE=has_pre, **_tile(size))
    return out
