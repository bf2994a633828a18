"""One program per row: it alone reads and writes that row's state, so nothing can race."""

import triton
import triton.language as tl

from ouro_kernels._launch import as_bytes, launch, pow2

TILE = 2048


@triton.jit
def _next_pass_kernel(
    hidden,
    tokens,
    embedding,
    exit_mask,
    active,
    loop,
    positions,
    survival,
    depth,
    block_table,
    slot_mapping,
    seq_lens,
    finished,
    position_limit,
    row_to_request,
    run_all,
    fill_copies,
    deepest,
    hidden_stride,
    embedding_stride,
    table_stride_loop,
    table_stride_row,
    size,
    block_size,
    total_loops,
    HAS_FINISHED: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    HAS_MAP: tl.constexpr,
    HAS_RUN_ALL: tl.constexpr,
    HAS_COPIES: tl.constexpr,
    HAS_DEEPEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    alive = tl.load(active + row) != 0
    leaves = alive & (tl.load(exit_mask + row) != 0)
    position = tl.load(positions + row).to(tl.int64)
    t = tl.load(loop + row)
    if leaves:
        position += 1
        t = t * 0
        ends = tl.load(exit_mask + row) == 0
        if HAS_FINISHED:
            ends = ends | (tl.load(finished + row) != 0)
        if HAS_LIMIT:
            ends = ends | (position >= tl.load(position_limit + row).to(tl.int64))
        alive = ends == 0
        tl.store(positions + row, position.to(positions.dtype.element_ty))
        tl.store(survival + row, 1.0)
        tl.store(depth + row, 0)
        tl.store(loop + row, t)
        tl.store(active + row, alive.to(tl.uint8))
        if alive:
            source = embedding + tl.load(tokens + row).to(tl.int64) * embedding_stride
            for first in range(0, size, BLOCK):
                col = first + tl.arange(0, BLOCK)
                value = tl.load(source + col, mask=col < size)
                tl.store(hidden + row * hidden_stride + col, value, mask=col < size)
    elif alive:
        t += 1
        tl.store(loop + row, t)

    slot = position * 0 - 1
    length = t * 0
    copies = t * 0
    if alive:
        request = row
        if HAS_MAP:
            request = tl.load(row_to_request + row).to(tl.int64)
        table = block_table + t.to(tl.int64) * table_stride_loop + request * table_stride_row
        page = tl.load(table + position // block_size).to(tl.int64)
        slot = page * block_size + position % block_size
        length = (position + 1).to(tl.int32)
        last = total_loops
        if HAS_DEEPEST:
            last = tl.load(deepest + row)
        copies = last - 1 - t
        if HAS_RUN_ALL:
            copies = tl.where(tl.load(run_all + row) != 0, 0, copies)
    tl.store(slot_mapping + row, slot)
    tl.store(seq_lens + row, length)
    if HAS_COPIES:
        tl.store(fill_copies + row, copies)


def next_pass(
    hidden,
    tokens,
    embedding,
    exit_mask,
    active,
    loop,
    positions,
    survival,
    depth,
    block_table,
    slot_mapping,
    seq_lens,
    block_size,
    finished=None,
    position_limit=None,
    row_to_request=None,
    run_all=None,
    fill_copies=None,
    deepest=None,
):
    rows, size = hidden.shape
    block = min(pow2(size), TILE)
    launch(
        _next_pass_kernel,
        (rows,),
        hidden,
        tokens,
        embedding,
        as_bytes(exit_mask),
        as_bytes(active),
        loop,
        positions,
        survival,
        depth,
        block_table,
        slot_mapping,
        seq_lens,
        as_bytes(finished),
        position_limit,
        row_to_request,
        as_bytes(run_all),
        fill_copies,
        deepest,
        hidden.stride(0),
        embedding.stride(0),
        *block_table.stride()[:2],
        size,
        block_size,
        block_table.shape[0],
        HAS_FINISHED=finished is not None,
        HAS_LIMIT=position_limit is not None,
        HAS_MAP=row_to_request is not None,
        HAS_RUN_ALL=run_all is not None,
        HAS_COPIES=fill_copies is not None,
        HAS_DEEPEST=deepest is not None,
        BLOCK=block,
        num_warps=min(max(block // 256, 1), 8),
    )
