"""The copies, one loop and one layer at a time."""

import torch


def standin_fill(table, block_table, slot_mapping, positions, loop, copies, row_to_request=None):
    block_size = table.k_caches[0].shape[1]
    live = (slot_mapping >= 0).nonzero().squeeze(1)
    for j in range(1, block_table.shape[0]):
        at = live[copies[live] >= j]
        request = at if row_to_request is None else row_to_request[at].long()
        page, offset = slot_mapping[at] // block_size, slot_mapping[at] % block_size
        deeper = block_table[loop[at].long() + j, request, positions[at] // block_size].long()
        for cache in (*table.k_caches, *table.v_caches):
            # fp8 has no index assignment on every build; the bytes do.
            same = cache.view(torch.uint8) if cache.element_size() == 1 else cache
            same[deeper, offset] = same[page, offset]
