"""Programs are (row, layer, group of heads); most rows stay and their programs end at once."""

import triton
import triton.language as tl

from ouro_kernels._launch import launch, pow2

TILE = 2048
_WORDS = {1: tl.int8, 2: tl.int16, 4: tl.int32}


@triton.jit
def _copy(
    address,
    at,
    stride_page,
    page,
    entry,
    table_stride_loop,
    copies,
    mask,
    WORD: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """From `page` to those of the next loops; `at`: offsets in a page, `entry`: the own page's."""
    base = address.to(tl.pointer_type(WORD))
    if ALIGNED:
        base = tl.multiple_of(base, 16)
    value = tl.load(base + page * stride_page + at, mask=mask)
    for _ in range(copies):
        entry += table_stride_loop
        deeper = tl.load(entry).to(tl.int64)
        if deeper != page:
            tl.store(base + deeper * stride_page + at, value, mask=mask)


@triton.jit
def _standin_fill_kernel(
    addresses,
    block_table,
    slot_mapping,
    positions,
    loop,
    copies,
    row_to_request,
    k_stride_page,
    k_stride_offset,
    k_stride_head,
    v_stride_page,
    v_stride_offset,
    v_stride_head,
    table_stride_loop,
    table_stride_row,
    block_size,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    WORD: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_MAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1).to(tl.int64)
    slot = tl.load(slot_mapping + row)
    count = tl.load(copies + row)
    if (slot < 0) | (count <= 0):
        return
    request = row
    if HAS_MAP:
        request = tl.load(row_to_request + row).to(tl.int64)
    own = tl.load(loop + row).to(tl.int64)
    entry = block_table + own * table_stride_loop + request * table_stride_row
    entry += tl.load(positions + row) // block_size
    head = (tl.program_id(2) * GROUP + tl.arange(0, GROUP)).to(tl.int64)[:, None]
    col = tl.arange(0, BLOCK_D)[None, :]
    mask = (head < HEADS) & (col < D)
    page = slot // block_size
    offset = slot % block_size
    k_at = offset * k_stride_offset + head * k_stride_head + col
    v_at = offset * v_stride_offset + head * v_stride_head + col
    k = tl.load(addresses + layer * 2)
    v = tl.load(addresses + layer * 2 + 1)
    next_loop = table_stride_loop
    _copy(k, k_at, k_stride_page, page, entry, next_loop, count, mask, WORD, ALIGNED)
    _copy(v, v_at, v_stride_page, page, entry, next_loop, count, mask, WORD, ALIGNED)


def standin_fill(table, block_table, slot_mapping, positions, loop, copies, row_to_request=None):
    k, v = table.k_caches[0], table.v_caches[0]
    _, block_size, heads, head_dim = k.shape
    block_d = pow2(head_dim)
    group = max(min(pow2(heads), TILE // block_d), 1)
    launch(
        _standin_fill_kernel,
        (slot_mapping.shape[0], len(table.k_caches), triton.cdiv(heads, group)),
        table.addresses,
        block_table,
        slot_mapping,
        positions,
        loop,
        copies,
        row_to_request,
        *k.stride()[:3],
        *v.stride()[:3],
        *block_table.stride()[:2],
        block_size,
        HEADS=heads,
        D=head_dim,
        BLOCK_D=block_d,
        GROUP=group,
        WORD=_WORDS[k.element_size()],
        ALIGNED=table.aligned,
        HAS_MAP=row_to_request is not None,
    )
