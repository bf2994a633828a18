"""Stage II: the gate alone, on cached states of a frozen language model."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ouro_runtime.training.data import ChatSource, Curriculum
from ouro_runtime.training.model import LoopLM
from ouro_runtime.training.objectives import Target, stage2_loss
from ouro_runtime.training.recipe import Recipe
from ouro_runtime.training.shared import served
from ouro_runtime.training.stage1 import token_losses

Gate = tuple[Tensor, Tensor]
"""weight [D] and bias [], fp32."""


@dataclass
class States:
    """What Stage II learns from: hidden [T, N, D] and losses [T, N] of N answer tokens."""

    hidden: Tensor
    losses: Tensor


def learned_levels(curriculum: Curriculum) -> dict[str, int]:
    """Levels a family has passed, or is about to: an unlearned one only teaches the gate noise."""
    return {
        name: level if curriculum.rates[name] >= 0.85 or level == 0 else level - 1
        for name, level in curriculum.levels.items()
    }


@torch.no_grad()
def cache_states(
    model: LoopLM, source: ChatSource, levels: dict[str, int], recipe: Recipe
) -> States:
    """States and losses of about `recipe.stage2_tokens` answer tokens of the training split."""
    device = next(model.parameters()).device
    source = ChatSource(source.tok, Curriculum(levels=levels), source.chat_share)
    hidden, losses, count, n = [], [], 0, 0
    while count < recipe.stage2_tokens:
        rng = random.Random(f"stage2 {recipe.seed} {n}")
        batch = source.batch(rng, recipe.rows, recipe.length)
        skip = recipe.skip_from < 1
        threshold = batch.thresholds(rng, recipe.skip_full).to(device) if skip else None
        batch = batch.to(device)
        states, target = served(model, batch, threshold, recipe.shared_rounds)
        loss, _, _ = token_losses(model, states, target)
        hidden.append(states.float())
        losses.append(loss)
        count, n = count + batch.pick.numel(), n + 1
    return States(torch.cat(hidden, 1), torch.cat(losses, 1))


def train_gate(states: States, start: Gate, target: Target, recipe: Recipe) -> tuple[Gate, float]:
    """A gate trained from `start` towards `target`, and its last loss. The states stay as they are.

    Deterministic in `recipe.seed`."""
    gen = torch.Generator().manual_seed(recipe.seed)
    weight = nn.Parameter(start[0].clone())
    bias = nn.Parameter(start[1].clone())
    opt = torch.optim.AdamW([weight, bias], lr=recipe.stage2_lr, weight_decay=0.0)
    total = recipe.stage2_steps
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda n: 1 - n / total)
    count, mean = states.losses.shape[1], 0.0
    for n in range(total):
        rows = torch.randint(count, (min(4096, count),), generator=gen).to(weight.device)
        loss = stage2_loss(states.hidden[:, rows] @ weight + bias, states.losses[:, rows], target)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        schedule.step()
        mean += (loss.item() - mean) * (0.02 if n else 1.0)
    return (weight.detach(), bias.detach()), mean


def gate_of(model: LoopLM) -> Gate:
    """The model's own gate."""
    linear = model.model.early_exit_gate
    return linear.weight[0].detach().clone(), linear.bias[0].detach().clone()


def set_gate(model: LoopLM, gate: Gate) -> None:
    with torch.no_grad():
        model.model.early_exit_gate.weight[0].copy_(gate[0])
        model.model.early_exit_gate.bias[0].copy_(gate[1])
