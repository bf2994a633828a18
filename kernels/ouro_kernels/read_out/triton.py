"""One program per tile of rows and vocabulary; without a row to read it writes zeros and ends."""

import torch
import triton
import triton.language as tl

from ouro_kernels._launch import as_bytes, launch, pow2


@triton.jit
def _read_out_kernel(
    hidden,
    weight,
    read_mask,
    logits,
    hidden_stride,
    weight_stride,
    logits_stride,
    rows,
    vocab,
    size,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    entry = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    read = tl.load(read_mask + row, mask=row < rows, other=0).to(tl.int32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if tl.max(read, axis=0) != 0:
        col = tl.arange(0, BLOCK_K)
        left = hidden + row.to(tl.int64)[:, None] * hidden_stride + col[None, :]
        right = weight + entry.to(tl.int64)[None, :] * weight_stride + col[:, None]
        for first in range(0, size, BLOCK_K):
            inside = first + col < size
            a = tl.load(left, mask=(read != 0)[:, None] & inside[None, :], other=0.0)
            b = tl.load(right, mask=(entry < vocab)[None, :] & inside[:, None], other=0.0)
            total = tl.dot(a, b, total, input_precision="ieee")
            left += BLOCK_K
            right += BLOCK_K
    target = logits + row.to(tl.int64)[:, None] * logits_stride + entry[None, :]
    mask = (row < rows)[:, None] & (entry < vocab)[None, :]
    tl.store(target, total.to(logits.dtype.element_ty), mask=mask)


def read_out(hidden, weight, read_mask):
    rows, size = hidden.shape
    vocab = len(weight)
    logits = torch.empty(rows, vocab, dtype=hidden.dtype, device=hidden.device)
    block_m = min(max(pow2(rows), 16), 128)
    # A tile of the weight fills the same bytes whatever its dtype.
    wide = block_m > 32
    block_n, block_k = (
        (128, 128 // hidden.element_size()) if wide else (64, 256 // hidden.element_size())
    )
    launch(
        _read_out_kernel,
        (triton.cdiv(vocab, block_n), triton.cdiv(rows, block_m)),
        hidden,
        weight,
        as_bytes(read_mask),
        logits,
        hidden.stride(0),
        weight.stride(0),
        logits.stride(0),
        rows,
        vocab,
        size,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=8 if wide else 4,
        num_stages=4 if not wide else 3,
    )
    return logits
