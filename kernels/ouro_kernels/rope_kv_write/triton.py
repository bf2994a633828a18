"""Programs are (row, group of heads): groups of q first, then groups of k with their v."""

import torch
import triton
import triton.language as tl

from ouro_kernels._launch import launch, pow2

HEADS_PER_PROGRAM = 4


@triton.jit
def _stored(x, scale, dtype: tl.constexpr, FP8: tl.constexpr):
    if FP8:
        x = tl.minimum(tl.maximum(x.to(tl.float32) / tl.load(scale), -448.0), 448.0)
    return x.to(dtype)


@triton.jit
def _rope_kv_write_kernel(
    qkv,
    cos_sin,
    positions,
    slot_mapping,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    fill_copies,
    q_out,
    block_table,
    loop,
    row_to_request,
    qkv_stride,
    cos_sin_stride,
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
    block_size,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    FP8: tl.constexpr,
    HAS_COPIES: tl.constexpr,
    HAS_MAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    slot = tl.load(slot_mapping + row)
    if slot < 0:
        return
    q_groups: tl.constexpr = (Q_HEADS + GROUP - 1) // GROUP
    half: tl.constexpr = D // 2
    lane = tl.arange(0, HALF)
    position = tl.load(positions + row).to(tl.int64)
    angles = cos_sin + position * cos_sin_stride + lane
    cos = tl.load(angles, mask=lane < half, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(angles + half, mask=lane < half, other=0.0).to(tl.float32)[None, :]
    dtype: tl.constexpr = qkv.dtype.element_ty
    packed = qkv + row * qkv_stride
    if group < q_groups:
        head = group * GROUP + tl.arange(0, GROUP)
        mask = (head[:, None] < Q_HEADS) & (lane[None, :] < half)
        source = packed + head[:, None] * D + lane[None, :]
        low = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        high = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
        target = q_out + row * q_stride_row + head[:, None] * q_stride_head + lane[None, :]
        tl.store(target, (low * cos - high * sin).to(dtype), mask=mask)
        tl.store(target + half, (high * cos + low * sin).to(dtype), mask=mask)
    else:
        head = (group - q_groups) * GROUP + tl.arange(0, GROUP)
        mask = (head[:, None] < KV_HEADS) & (lane[None, :] < half)
        source = packed + (Q_HEADS + head[:, None]) * D + lane[None, :]
        low = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        high = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
        v_low = tl.load(source + KV_HEADS * D, mask=mask, other=0.0)
        v_high = tl.load(source + KV_HEADS * D + half, mask=mask, other=0.0)
        stored: tl.constexpr = k_cache.dtype.element_ty
        # Rounded to the model's dtype first, so that an fp8 cache equals rope-then-quantize.
        k_low = _stored((low * cos - high * sin).to(dtype), k_scale, stored, FP8)
        k_high = _stored((high * cos + low * sin).to(dtype), k_scale, stored, FP8)
        v_low = _stored(v_low, v_scale, stored, FP8)
        v_high = _stored(v_high, v_scale, stored, FP8)
        page = slot // block_size
        offset = slot % block_size
        head64 = head.to(tl.int64)[:, None]
        k_in = k_cache + offset * k_stride_offset + head64 * k_stride_head + lane[None, :]
        v_in = v_cache + offset * v_stride_offset + head64 * v_stride_head + lane[None, :]
        k_to = k_in + page * k_stride_page
        v_to = v_in + page * v_stride_page
        tl.store(k_to, k_low, mask=mask)
        tl.store(k_to + half, k_high, mask=mask)
        tl.store(v_to, v_low, mask=mask)
        tl.store(v_to + half, v_high, mask=mask)
        if HAS_COPIES:
            request = row
            if HAS_MAP:
                request = tl.load(row_to_request + row).to(tl.int64)
            own = tl.load(loop + row).to(tl.int64)
            entry = block_table + own * table_stride_loop + request * table_stride_row
            entry += position // block_size
            for _ in range(tl.load(fill_copies + row)):
                entry += table_stride_loop
                deeper = tl.load(entry).to(tl.int64)
                if deeper != page:
                    k_deeper = k_in + deeper * k_stride_page
                    v_deeper = v_in + deeper * v_stride_page
                    tl.store(k_deeper, k_low, mask=mask)
                    tl.store(k_deeper + half, k_high, mask=mask)
                    tl.store(v_deeper, v_low, mask=mask)
                    tl.store(v_deeper + half, v_high, mask=mask)


def rope_kv_write(
    qkv,
    cos_sin,
    positions,
    slot_mapping,
    k_cache,
    v_cache,
    k_scale=None,
    v_scale=None,
    fill_copies=None,
    q_out=None,
    block_table=None,
    loop=None,
    row_to_request=None,
):
    rows = qkv.shape[0]
    _, block_size, kv_heads, head_dim = k_cache.shape
    q_heads = qkv.shape[1] // head_dim - 2 * kv_heads
    if q_out is None:
        q_out = torch.empty(rows, q_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    groups = -(-q_heads // HEADS_PER_PROGRAM) - (-kv_heads // HEADS_PER_PROGRAM)
    launch(
        _rope_kv_write_kernel,
        (rows, groups),
        qkv,
        cos_sin,
        positions,
        slot_mapping,
        k_cache,
        v_cache,
        k_scale,
        v_scale,
        fill_copies,
        q_out,
        block_table,
        loop,
        row_to_request,
        qkv.stride(0),
        cos_sin.stride(0),
        q_out.stride(0),
        q_out.stride(1),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        *((0, 0) if fill_copies is None else block_table.stride()[:2]),
        block_size,
        Q_HEADS=q_heads,
        KV_HEADS=kv_heads,
        D=head_dim,
        HALF=pow2(head_dim // 2),
        GROUP=HEADS_PER_PROGRAM,
        FP8=k_scale is not None,
        HAS_COPIES=fill_copies is not None,
        HAS_MAP=row_to_request is not None,
        num_warps=2,
    )
    return q_out
