"""Answers as mode `shared` serves them, in parallel forwards (docs/engine.md says what it keeps).

A generated position reads one plane at every loop: loop T's K/V of its prompt, the exit loop's of
the generated positions before it. Those are known only once these have run, one after the other.
Here all run at once, in rounds: each reads what the round before left, the first what the forward
of mode `skip` left. The n-th generated position of an answer is exact after n rounds, and those
behind it nearly so where little hangs on the K/V of an answer's tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ouro_runtime.training.data import MASKED, Batch
from ouro_runtime.training.model import LoopLM


@dataclass
class Generated:
    """The generated tokens of a batch, G a row and padded with others.

    column [B, G] int64, where they stand in their rows; bias [B, 1, G, S + 2 G] float, what they
    read: of S positions the prompt, of G those before them in their answer, of G themselves; index
    [M] which of the B*G are none of the padding, and pick [M] which of the batch's N they are."""

    column: Tensor
    bias: Tensor
    index: Tensor
    pick: Tensor


def generated(batch: Batch) -> Generated:
    """The generated tokens of `batch`: an answer's first is none, its prompt's end predicts it."""
    rows, length = batch.ids.shape
    answer = torch.full((rows * length,), -1)
    later = torch.ones(len(batch.pick), dtype=torch.bool)
    for n, (_, _, start, end) in enumerate(batch.spans):
        answer[batch.pick[start + 1 : end]] = n
        later[start] = False
    answer = answer.view(rows, length)
    width = int((answer >= 0).sum(1).max())
    column = (answer < 0).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
    mine = answer.gather(1, column)
    before = batch.bias[:, 0].gather(1, column[:, :, None].expand(-1, -1, length))
    prompt = torch.where(answer[:, None, :] == mine[:, :, None], MASKED, before)
    earlier = column[:, None, :] < column[:, :, None]
    own = torch.where(earlier & (mine[:, None, :] == mine[:, :, None]), 0.0, MASKED)
    self_ = torch.where(torch.eye(width, dtype=torch.bool), 0.0, MASKED).expand_as(own)
    bias = torch.cat((prompt, own, self_), 2)[:, None]
    return Generated(column, bias, (mine >= 0).flatten().nonzero()[:, 0], later.nonzero()[:, 0])


def served(
    model: LoopLM, batch: Batch, threshold: Tensor | None, rounds: int
) -> tuple[Tensor, Tensor]:
    """States [loops, N, D] of the batch's answers as `skip` serves them at `threshold` (`LoopLM`),
    and their targets [N]; with `rounds`, behind them those of the generated ones in `shared`."""
    columns = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    states, planes = model.run_loops(batch.ids, columns, batch.bias, threshold)
    states = states.flatten(1, 2)[:, batch.pick]
    if not rounds:
        return states, batch.target
    some = generated(batch)
    ids = batch.ids.gather(1, some.column)
    leaves = None if threshold is None else threshold.gather(1, some.column)
    rows = torch.arange(len(ids), device=ids.device)[:, None]
    own = [tuple(x[rows, :, some.column].transpose(1, 2) for x in plane) for plane in planes]
    for _ in range(rounds):
        read = [
            tuple(torch.cat(pair, 2) for pair in zip(plane, mine, strict=True))
            for plane, mine in zip(planes, own, strict=True)
        ]
        shared, own = model.run_loops(ids, some.column, some.bias, leaves, read)
    shared = shared.flatten(1, 2)[:, some.index]
    return torch.cat((states, shared), 1), torch.cat((batch.target, batch.target[some.pick]))
