"""One program per row: a dot product of one row, then scalar arithmetic."""

import torch
import triton
import triton.language as tl

from ouro_kernels._launch import as_bytes, launch, pow2


@triton.jit
def _exit_gate_kernel(
    h,
    weight,
    bias,
    survival,
    depth,
    loop,
    threshold,
    min_loops,
    max_loops,
    run_all,
    active,
    exit_mask,
    read_mask,
    history,
    deepest,
    h_stride,
    history_stride,
    size,
    total_loops,
    HAS_RUN_ALL: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    HAS_HISTORY: tl.constexpr,
    HAS_DEEPEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if HAS_ACTIVE:
        idle = tl.load(active + row) == 0
        if idle:
            tl.store(exit_mask + row, 0)
            tl.store(read_mask + row, 0)
            return
    col = tl.arange(0, BLOCK)
    mask = col < size
    state = tl.load(h + row * h_stride + col, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + col, mask=mask, other=0.0).to(tl.float32)
    gate = tl.sigmoid(tl.sum(state * w, axis=0) + tl.load(bias).to(tl.float32))
    left = tl.load(survival + row) * (1.0 - gate)
    done = tl.load(loop + row)
    n = done + 1
    limit = tl.load(threshold + row)
    by_gate = (limit < 1.0) & (1.0 - left >= limit) & (n >= tl.load(min_loops + row))
    most = total_loops
    if HAS_DEEPEST:
        most = tl.load(deepest + row)
    last = n >= most
    fires = by_gate | (n >= tl.load(max_loops + row)) | last
    seen = tl.load(depth + row)
    reads = fires & (seen == 0)
    leaves = fires
    if HAS_RUN_ALL:
        leaves = tl.where(tl.load(run_all + row) != 0, last, fires)
    tl.store(survival + row, left)
    if HAS_HISTORY:
        tl.store(history + row * history_stride + done, left)
    tl.store(depth + row, tl.where(reads, n, seen))
    tl.store(exit_mask + row, leaves.to(tl.uint8))
    tl.store(read_mask + row, reads.to(tl.uint8))


def exit_gate(
    h,
    weight,
    bias,
    survival,
    depth,
    loop,
    threshold,
    min_loops,
    max_loops,
    total_loops,
    run_all=None,
    active=None,
    exit_mask=None,
    read_mask=None,
    history=None,
    deepest=None,
):
    rows, size = h.shape
    if exit_mask is None:
        exit_mask = torch.empty(rows, dtype=torch.bool, device=h.device)
    if read_mask is None:
        read_mask = torch.empty(rows, dtype=torch.bool, device=h.device)
    block = pow2(size)
    launch(
        _exit_gate_kernel,
        (rows,),
        h,
        weight,
        bias,
        survival,
        depth,
        loop,
        threshold,
        min_loops,
        max_loops,
        as_bytes(run_all),
        as_bytes(active),
        as_bytes(exit_mask),
        as_bytes(read_mask),
        history,
        deepest,
        h.stride(0),
        0 if history is None else history.stride(0),
        size,
        total_loops,
        HAS_RUN_ALL=run_all is not None,
        HAS_ACTIVE=active is not None,
        HAS_HISTORY=history is not None,
        HAS_DEEPEST=deepest is not None,
        BLOCK=block,
        num_warps=min(max(block // 256, 1), 16),
    )
    return exit_mask, read_mask
