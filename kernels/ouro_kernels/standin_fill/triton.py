"""Programs are (row, layer, group of heads); most rows stay and their programs end at once."""

import triton
import triton.language as tl

from ouro_kernels._launch import as_bytes, launch, pow2

TILE = 2048
_WORDS = {1: tl.int8, 2: tl.int16, 4: tl.int32}


@triton.jit
def _copy(address, at, stride_page, copies, mask, WORD: tl.constexpr, ALIGNED: tl.constexpr):
    base = address.to(tl.pointer_type(WORD))
    if ALIGNED:
        base = tl.multiple_of(base, 16)
    value = tl.load(base + at, mask=mask)
    for _ in range(copies):
        at += stride_page
        tl.store(base + at, value, mask=mask)


@triton.jit
def _standin_fill_kernel(
    addresses,
    slot_mapping,
    loop,
    exit_mask,
    k_stride_page,
    k_stride_offset,
    k_stride_head,
    v_stride_page,
    v_stride_offset,
    v_stride_head,
    total_loops,
    block_size,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    WORD: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1).to(tl.int64)
    slot = tl.load(slot_mapping + row)
    leaves = tl.load(exit_mask + row) != 0
    if (slot < 0) | (leaves == 0):
        return
    copies = total_loops - 1 - tl.load(loop + row)
    if copies <= 0:
        return
    head = (tl.program_id(2) * GROUP + tl.arange(0, GROUP)).to(tl.int64)[:, None]
    col = tl.arange(0, BLOCK_D)[None, :]
    mask = (head < HEADS) & (col < D)
    page = slot // block_size
    offset = slot % block_size
    k_at = page * k_stride_page + offset * k_stride_offset + head * k_stride_head + col
    v_at = page * v_stride_page + offset * v_stride_offset + head * v_stride_head + col
    k = tl.load(addresses + layer * 2)
    v = tl.load(addresses + layer * 2 + 1)
    _copy(k, k_at, k_stride_page, copies, mask, WORD, ALIGNED)
    _copy(v, v_at, v_stride_page, copies, mask, WORD, ALIGNED)


def standin_fill(table, slot_mapping, loop, exit_mask, total_loops):
    k, v = table.k_caches[0], table.v_caches[0]
    _, block_size, heads, head_dim = k.shape
    block_d = pow2(head_dim)
    group = max(min(pow2(heads), TILE // block_d), 1)
    launch(
        _standin_fill_kernel,
        (slot_mapping.shape[0], len(table.k_caches), triton.cdiv(heads, group)),
        table.addresses,
        slot_mapping,
        loop,
        as_bytes(exit_mask),
        *k.stride()[:3],
        *v.stride()[:3],
        total_loops,
        block_size,
        HEADS=heads,
        D=head_dim,
        BLOCK_D=block_d,
        GROUP=group,
        WORD=_WORDS[k.element_size()],
        ALIGNED=table.aligned,
    )
