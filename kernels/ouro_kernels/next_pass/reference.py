"""The same bookkeeping, in plain PyTorch."""

import torch


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
    leaves = active & exit_mask
    stays = active & ~exit_mask
    loop.copy_(torch.where(leaves, 0, torch.where(stays, loop + 1, loop)))
    positions.add_(leaves.to(positions.dtype))
    survival.masked_fill_(leaves, 1.0)
    depth.masked_fill_(leaves, 0)
    ends = torch.zeros_like(leaves)
    if finished is not None:
        ends |= finished
    if position_limit is not None:
        ends |= positions >= position_limit
    active.logical_and_(~(leaves & ends))
    entering = leaves & active
    hidden[entering] = embedding[tokens[entering].long()]

    slot_mapping.fill_(-1)
    seq_lens.zero_()
    if fill_copies is not None:
        fill_copies.zero_()
    for row in active.nonzero().squeeze(1).tolist():
        request = row if row_to_request is None else int(row_to_request[row])
        position, t = int(positions[row]), int(loop[row])
        page = int(block_table[t, request, position // block_size])
        slot_mapping[row] = page * block_size + position % block_size
        seq_lens[row] = position + 1
        if fill_copies is not None and not (run_all is not None and bool(run_all[row])):
            last = block_table.shape[0] if deepest is None else int(deepest[row])
            fill_copies[row] = last - 1 - t
