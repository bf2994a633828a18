"""Split-K/V decode: programs are (row, K/V head, split); a second kernel combines the splits.

With as many query heads as K/V heads a tensor-core tile would be one row in sixteen, so that case
has its own kernel without matrix products: each lane of the tile walks every BLOCK_N-th position
with its own running maximum, and lanes meet only once, at the end.
"""

import torch
import triton
import triton.language as tl

from ouro_kernels._launch import launch, pow2

LOG2_E = 1.4426950408889634


@triton.jit
def _span(length, split, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The positions [start, end) of a split; empty beyond the row's length."""
    tiles = tl.cdiv(tl.cdiv(length, BLOCK_N), SPLITS)
    start = split * tiles * BLOCK_N
    return start, tl.minimum(length, start + tiles * BLOCK_N)


@triton.jit
def _pages(block_table, loop, request, stride_loop, stride_row):
    """Where a request's pages at a loop are listed."""
    return block_table + loop * stride_loop + request * stride_row


@triton.jit
def _locate(table, position, mask, block_size):
    """(page, offset) of logical positions, int64."""
    page = tl.load(table + position // block_size, mask=mask, other=0).to(tl.int64)
    return page, (position % block_size).to(tl.int64)


@triton.jit
def _attend_mha_kernel(
    q,
    k_cache,
    v_cache,
    block_table,
    row_to_request,
    loop,
    seq_lens,
    k_scale,
    v_scale,
    out,
    log_sums,
    q_stride_row,
    q_stride_head,
    k_stride_page,
    k_stride_offset,
    k_stride_head,
    v_stride_page,
    v_stride_offset,
    v_stride_head,
    table_stride_loop,
    table_stride_row,
    out_stride_row,
    out_stride_head,
    out_stride_split,
    block_size,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    FP8: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    length = tl.load(seq_lens + row)
    col = tl.arange(0, BLOCK_D)
    inside = col < D
    target = out + row * out_stride_row + head * out_stride_head + split * out_stride_split + col
    at = (row * tl.num_programs(1) + head) * SPLITS + split
    start, end = _span(length, split, SPLITS, BLOCK_N)
    if start >= end:
        if SPLITS > 1:
            tl.store(log_sums + at, -float("inf"))
        else:
            tl.store(target, tl.zeros([BLOCK_D], out.dtype.element_ty), mask=inside)
        return
    request = row
    if HAS_MAP:
        request = tl.load(row_to_request + row).to(tl.int64)
    this_loop = tl.load(loop + row).to(tl.int64)
    table = _pages(block_table, this_loop, request, table_stride_loop, table_stride_row)
    factor = scale
    if FP8:
        factor = scale * tl.load(k_scale)
    query = q + row * q_stride_row + head * q_stride_head + col
    query = tl.load(query, mask=inside, other=0.0).to(tl.float32)[None, :] * factor
    k_head = k_cache + head * k_stride_head
    v_head = v_cache + head * v_stride_head
    top = tl.full([BLOCK_N], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in range(start, end, BLOCK_N):
        position = first + tl.arange(0, BLOCK_N)
        valid = position < end
        page, offset = _locate(table, position, valid, block_size)
        mask = valid[:, None] & inside[None, :]
        k_at = (page * k_stride_page + offset * k_stride_offset)[:, None] + col[None, :]
        v_at = (page * v_stride_page + offset * v_stride_offset)[:, None] + col[None, :]
        k = tl.load(k_head + k_at, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_head + v_at, mask=mask, other=0.0).to(tl.float32)
        score = tl.where(valid, tl.sum(k * query, axis=1), -float("inf"))
        new_top = tl.maximum(top, score)
        # A lane that has seen no position yet: keep inf - inf out of the exponent.
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        keep = tl.exp2(top - base)
        weight = tl.exp2(score - base)
        acc = acc * keep[:, None] + weight[:, None] * v
        total = total * keep + weight
        top = new_top
    best = tl.max(top, axis=0)
    share = tl.exp2(top - best)
    mass = tl.sum(total * share, axis=0)
    result = tl.sum(acc * share[:, None], axis=0) / mass
    if FP8:
        result = result * tl.load(v_scale)
    tl.store(target, result.to(out.dtype.element_ty), mask=inside)
    if SPLITS > 1:
        tl.store(log_sums + at, best + tl.log2(mass))


@triton.jit
def _attend_gqa_kernel(
    q,
    k_cache,
    v_cache,
    block_table,
    row_to_request,
    loop,
    seq_lens,
    k_scale,
    v_scale,
    out,
    log_sums,
    q_stride_row,
    q_stride_head,
    k_stride_page,
    k_stride_offset,
    k_stride_head,
    v_stride_page,
    v_stride_offset,
    v_stride_head,
    table_stride_loop,
    table_stride_row,
    out_stride_row,
    out_stride_head,
    out_stride_split,
    block_size,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    FP8: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    length = tl.load(seq_lens + row)
    col = tl.arange(0, BLOCK_D)
    member = tl.arange(0, BLOCK_M)
    head = kv_head * GROUP + member
    tile = (member[:, None] < GROUP) & (col[None, :] < D)
    target = out + row * out_stride_row + split * out_stride_split
    target = target + head[:, None] * out_stride_head + col[None, :]
    at = (row * tl.num_programs(1) * GROUP + head) * SPLITS + split
    start, end = _span(length, split, SPLITS, BLOCK_N)
    if start >= end:
        if SPLITS > 1:
            empty = tl.full([BLOCK_M], -float("inf"), tl.float32)
            tl.store(log_sums + at, empty, mask=member < GROUP)
        else:
            tl.store(target, tl.zeros([BLOCK_M, BLOCK_D], out.dtype.element_ty), mask=tile)
        return
    request = row
    if HAS_MAP:
        request = tl.load(row_to_request + row).to(tl.int64)
    this_loop = tl.load(loop + row).to(tl.int64)
    table = _pages(block_table, this_loop, request, table_stride_loop, table_stride_row)
    factor = scale
    if FP8:
        factor = scale * tl.load(k_scale)
    query = q + row * q_stride_row + head[:, None] * q_stride_head + col[None, :]
    query = tl.load(query, mask=tile, other=0.0)
    k_head = k_cache + kv_head * k_stride_head
    v_head = v_cache + kv_head * v_stride_head
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(start, end, BLOCK_N):
        position = first + tl.arange(0, BLOCK_N)
        valid = position < end
        page, offset = _locate(table, position, valid, block_size)
        mask = valid[:, None] & (col[None, :] < D)
        k_at = (page * k_stride_page + offset * k_stride_offset)[:, None] + col[None, :]
        v_at = (page * v_stride_page + offset * v_stride_offset)[:, None] + col[None, :]
        k = tl.load(k_head + k_at, mask=mask, other=0.0).to(query.dtype)
        v = tl.load(v_head + v_at, mask=mask, other=0.0).to(query.dtype)
        score = tl.dot(query, tl.trans(k), input_precision="ieee") * factor
        score = tl.where(valid[None, :], score, -float("inf"))
        # Every tile holds at least one valid position, so the maximum is finite.
        new_top = tl.maximum(top, tl.max(score, axis=1))
        keep = tl.exp2(top - new_top)
        weight = tl.exp2(score - new_top[:, None])
        acc = acc * keep[:, None]
        acc += tl.dot(weight.to(query.dtype), v, input_precision="ieee")
        total = total * keep + tl.sum(weight, axis=1)
        top = new_top
    result = acc / total[:, None]
    if FP8:
        result = result * tl.load(v_scale)
    tl.store(target, result.to(out.dtype.element_ty), mask=tile)
    if SPLITS > 1:
        tl.store(log_sums + at, top + tl.log2(total), mask=member < GROUP)


@triton.jit
def _combine_kernel(
    partial,
    log_sums,
    out,
    out_stride_row,
    out_stride_head,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    at = (row * tl.num_programs(1) + head) * SPLITS + tl.arange(0, SPLITS)
    log_sum = tl.load(log_sums + at)
    col = tl.arange(0, BLOCK_D)
    # An empty split wrote no partial result: what lies there is never read.
    mask = (log_sum > -float("inf"))[:, None] & (col[None, :] < D)
    part = tl.load(partial + at[:, None] * D + col[None, :], mask=mask, other=0.0)
    best = tl.max(log_sum, axis=0)
    weight = tl.exp2(log_sum - tl.where(best == -float("inf"), 0.0, best))
    mass = tl.sum(weight, axis=0)
    result = tl.sum(part * weight[:, None], axis=0) / tl.where(mass > 0.0, mass, 1.0)
    target = out + row * out_stride_row + head * out_stride_head + col
    tl.store(target, result.to(out.dtype.element_ty), mask=col < D)


def loop_decode_attention(
    q,
    k_cache,
    v_cache,
    block_table,
    loop,
    seq_lens,
    scale,
    row_to_request=None,
    k_scale=None,
    v_scale=None,
    num_splits=1,
    out=None,
):
    rows, q_heads, head_dim = q.shape
    block_size, kv_heads = k_cache.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    group = q_heads // kv_heads
    block_d = max(pow2(head_dim), 16)
    if num_splits > 1:
        shape = (rows, q_heads, num_splits, head_dim)
        target = torch.empty(shape, dtype=torch.float32, device=q.device)
        log_sums = torch.empty(shape[:3], dtype=torch.float32, device=q.device)
        strides = target.stride()[:3]
    else:
        target, log_sums, strides = out, None, (out.stride(0), out.stride(1), 0)
    sizes = {"D": head_dim, "BLOCK_D": block_d, "SPLITS": num_splits}
    flags = {"HAS_MAP": row_to_request is not None, "FP8": k_scale is not None}
    if group == 1:
        kernel, warps, tile = _attend_mha_kernel, 4, {"BLOCK_N": 32}
    else:
        # fp32 products run on the general-purpose units: more warps keep the tiles in registers.
        kernel = _attend_gqa_kernel
        block_n, warps = (64, 4)
        if q.dtype == torch.float32:
            block_n, warps = (32 if k_scale is None else 16, 8)
        tile = {"BLOCK_N": block_n, "GROUP": group, "BLOCK_M": max(pow2(group), 16)}
    launch(
        kernel,
        (rows, kv_heads, num_splits),
        q,
        k_cache,
        v_cache,
        block_table,
        row_to_request,
        loop,
        seq_lens,
        k_scale,
        v_scale,
        target,
        log_sums,
        q.stride(0),
        q.stride(1),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        *block_table.stride()[:2],
        *strides,
        block_size,
        scale * LOG2_E,
        **sizes,
        **flags,
        **tile,
        num_warps=warps,
        num_stages=2,
    )
    if num_splits > 1:
        grid = (rows, q_heads)
        launch(_combine_kernel, grid, target, log_sums, out, out.stride(0), out.stride(1), **sizes)
    return out
