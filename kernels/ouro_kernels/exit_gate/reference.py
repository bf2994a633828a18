"""The exit rule of the specification, in plain PyTorch."""

import torch


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
    everyone = torch.ones_like(loop, dtype=torch.bool)
    active = everyone if active is None else active
    run_all = ~everyone if run_all is None else run_all
    gate = torch.sigmoid(h.float() @ weight.float() + bias.float())
    left = survival * (1 - gate)
    n = loop + 1
    last = n >= (total_loops if deepest is None else deepest)
    by_gate = (threshold < 1) & (1 - left >= threshold) & (n >= min_loops)
    fires = by_gate | (n >= max_loops) | last
    reads = active & fires & (depth == 0)
    leaves = active & torch.where(run_all, last, fires)
    survival.copy_(torch.where(active, left, survival))
    depth.copy_(torch.where(reads, n, depth))
    if history is not None:
        column = torch.arange(total_loops, device=loop.device)
        here = active[:, None] & (column == loop[:, None])
        history.copy_(torch.where(here, left[:, None], history))
    return (
        leaves if exit_mask is None else exit_mask.copy_(leaves),
        reads if read_mask is None else read_mask.copy_(reads),
    )
