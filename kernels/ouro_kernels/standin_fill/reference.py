"""The copies, one loop and one layer at a time."""

import torch


def standin_fill(table, slot_mapping, loop, exit_mask, total_loops):
    block_size = table.k_caches[0].shape[1]
    for j in range(1, total_loops):
        rows = exit_mask & (slot_mapping >= 0) & (loop + j < total_loops)
        slots = slot_mapping[rows]
        page, offset = slots // block_size, slots % block_size
        for cache in (*table.k_caches, *table.v_caches):
            # fp8 has no index assignment on every build; the bytes do.
            same = cache.view(torch.uint8) if cache.element_size() == 1 else cache
            same[page + j, offset] = same[page, offset]
