"""Stage I: the language model and its gate, by the expected loss over loops."""

import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from ouro_runtime.training.data import ChatSource, Curriculum
from ouro_runtime.training.export import load
from ouro_runtime.training.model import LoopLM, LoopLMConfig
from ouro_runtime.training.objectives import exit_log_probs, stage1_loss
from ouro_runtime.training.optim import optimizers
from ouro_runtime.training.recipe import Recipe
from ouro_runtime.training.shared import served


@dataclass
class Budget:
    """How long to train: a number of steps, or minutes of training time over all resumed runs."""

    steps: int | None = None
    minutes: float | None = None

    def progress(self, step: int, seconds: float) -> float:
        """Share of the budget used, 1 and above when it is spent."""
        if self.steps is not None:
            return step / self.steps
        assert self.minutes is not None, "a budget needs steps or minutes"
        return seconds / (60 * self.minutes)


@dataclass
class Report:
    """Running means over the last steps, for the progress bar and the log."""

    losses: Tensor
    depth: float
    entries: dict[str, Any] = field(default_factory=dict)


def token_losses(model: LoopLM, states: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(losses [T, N], gate logits [T, N], whether loop T's argmax is right [N]) of answer tokens
    `target` [N], whose states [T, N, D] the model gave."""
    logits = model.lm_head(states)
    loops, count, vocab = logits.shape
    losses = F.cross_entropy(
        logits.reshape(-1, vocab).float(), target.expand(loops, count).reshape(-1), reduction="none"
    ).view(loops, count)
    right = logits[-1].detach().argmax(-1) == target
    return losses, model.gate(states).float(), right


class Stage1:
    """The trainer. All of its state is in `state()`: a run that is killed and resumed from a save
    takes the same steps as one that was not."""

    def __init__(self, recipe: Recipe, tok: Tokenizer, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        torch.manual_seed(recipe.seed)
        shape = LoopLMConfig(
            vocab_size=recipe.vocab_size,
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_layers=recipe.num_layers,
            num_heads=recipe.num_heads,
            loops=recipe.loops,
        )
        self.model = LoopLM(shape).to(device)
        self.opts = optimizers(self.model, recipe.muon_lr, recipe.adam_lr, recipe.weight_decay)
        for opt in self.opts:
            for group in opt.param_groups:
                group["base_lr"] = group["lr"]
        self.curriculum = Curriculum()
        self.source = ChatSource(tok, self.curriculum)
        self.step, self.seconds, self.tokens = 0, 0.0, 0
        self.report: Report | None = None

    def state(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.to_dict(),
            "model": self.model.state_dict(),
            "opts": [o.state_dict() for o in self.opts],
            "curriculum": self.curriculum.state(),
            "step": self.step,
            "seconds": self.seconds,
            "tokens": self.tokens,
        }

    def save(self, path: Path) -> None:
        """Write atomically: a kill during the save leaves the one before."""
        part = path.with_suffix(".part")
        torch.save(self.state(), part)
        part.replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for opt, saved in zip(self.opts, state["opts"], strict=True):
            opt.load_state_dict(saved)
        self.curriculum.load(state["curriculum"])
        self.step, self.seconds, self.tokens = state["step"], state["seconds"], state["tokens"]

    def begin_from(self, folder: Path) -> None:
        """Start from an exported checkpoint's weights, with every family at its hardest level."""
        model, _ = load(folder)
        if model.cfg != self.model.cfg:
            raise ValueError(f"--init: {folder} has other shapes than the recipe's")
        self.model.load_state_dict(model.state_dict())
        self.curriculum.levels = dict(self.curriculum.tops)

    def train_step(self, progress: float) -> None:
        recipe = self.recipe
        # A generator per step: the data of step n depends on n and the curriculum, not on history.
        rng = random.Random(f"stage1 {recipe.seed} {self.step}")
        batch = self.source.batch(rng, recipe.rows, recipe.length)
        skip = progress >= recipe.skip_from
        threshold = batch.thresholds(rng, recipe.skip_full).to(self.device) if skip else None
        batch = batch.to(self.device)
        scale = recipe.lr_scale(self.step, progress)
        for opt in self.opts:
            for group in opt.param_groups:
                group["lr"] = group["base_lr"] * scale
        states, target = served(self.model, batch, threshold, recipe.shared_rounds)
        losses, gate, right = token_losses(self.model, states, target)
        stage1_loss(losses, gate, recipe.beta(progress)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        for opt in self.opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        rights = right.tolist()
        for name, level, start, end in batch.spans:
            if name != "chat":
                self.curriculum.record(name, level, all(rights[start:end]))
        self._track(losses.detach(), gate.detach())
        self.step += 1
        self.tokens += recipe.rows * recipe.length

    def _track(self, losses: Tensor, gate: Tensor) -> None:
        p = exit_log_probs(gate).exp()
        depths = torch.arange(1, len(p) + 1, device=p.device, dtype=p.dtype)
        depth = float((p * depths[:, None]).sum(0).mean())
        mean = losses.mean(1).cpu()
        if self.report is None:
            self.report = Report(mean, depth)
        self.report.losses = self.report.losses.lerp(mean, 0.05)
        self.report.depth += 0.05 * (depth - self.report.depth)

    def run(self, budget: Budget, save_to: Path | None, save_every: float = 60.0) -> None:
        """Train until the budget is spent, saving every `save_every` seconds and at the end."""
        start, before, saved = time.monotonic(), self.seconds, time.monotonic()
        bar = tqdm(initial=self.step, total=budget.steps, desc="stage 1", mininterval=10.0)
        while (progress := budget.progress(self.step, self.seconds)) < 1:
            self.train_step(progress)
            self.seconds = before + time.monotonic() - start
            bar.update()
            if self.step % 20 == 0:
                bar.set_postfix_str(self.describe(), refresh=False)
            if save_to and time.monotonic() - saved > save_every:
                self.save(save_to)
                saved = time.monotonic()
        bar.set_postfix_str(self.describe())
        bar.close()
        if save_to:
            self.save(save_to)

    def describe(self) -> str:
        """Loss per loop, mean depth of the gate, level and pass rate of each family."""
        if self.report is None:
            return ""
        losses = "/".join(f"{x:.3f}" for x in self.report.losses.tolist())
        levels = " ".join(
            f"{n} {level}:{self.curriculum.rates[n]:.2f}"
            for n, level in self.curriculum.levels.items()
        )
        return f"loss {losses} depth {self.report.depth:.2f} {levels}"
