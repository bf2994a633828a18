"""The recipe's numbers, and the corpus its tokenizer is trained on."""

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from ouro_runtime.training.tasks import FAMILIES, SYSTEM_PROMPTS, Chat
from ouro_runtime.training.tokenizer import render


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the checkpoint, but for its length (`--steps` or `--minutes`)."""

    seed: int = 0
    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 2
    num_heads: int = 4
    loops: int = 4
    rows: int = 16
    length: int = 128
    muon_lr: float = 0.01
    adam_lr: float = 3e-3
    weight_decay: float = 0.01
    clip: float = 1.0
    warmup_steps: int = 100
    decay_share: float = 0.6
    """The learning rate is constant, then falls linearly to `final_lr` over this last share."""
    final_lr: float = 0.02
    beta_start: float = 0.3
    """Entropy weight at the start: high, so that every loop is trained; it falls to `beta_end`."""
    beta_end: float = 0.1
    skip_from: float = 1.0
    """Share of the run after which answers are trained with the stand-in K/V that mode `skip`
    serves them with, at a random threshold per row."""
    skip_full: float = 0.25
    """Share of the rows that keep true K/V even then."""
    shared_rounds: int = 0
    """Above 0 generated tokens are also trained as mode `shared` serves them, in so many rounds
    (`ouro_runtime.training.shared`), at the same thresholds."""
    corpus_problems: int = 6000
    stage2_tokens: int = 60_000
    stage2_steps: int = 1500
    stage2_lr: float = 0.02

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lr_scale(self, step: int, progress: float) -> float:
        """Factor on both learning rates, `progress` in [0, 1] of the run."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        left = min(1.0, (1 - progress) / self.decay_share)
        return warm * (self.final_lr + (1 - self.final_lr) * max(0.0, left))

    def beta(self, progress: float) -> float:
        """Entropy weight: linear over the first half of the run, then constant."""
        return self.beta_end + (self.beta_start - self.beta_end) * max(0.0, 1 - 2 * progress)


CONTINUED = Recipe(
    muon_lr=0.005, adam_lr=1.5e-3, decay_share=0.8, beta_start=0.05, beta_end=0.05, skip_from=0.4
)
"""The second leg: from the first leg's weights, every family at its hardest level from the start,
half the learning rate, the paper's later entropy weight, and in the end stand-in K/V."""

SHARED = replace(CONTINUED, decay_share=0.55, skip_from=0.0, shared_rounds=2)
"""A third leg, `--shared`: from the second's weights, answers as `skip` and as `shared` serve them.
The shipped checkpoint is from before it."""


def corpus(recipe: Recipe) -> Iterator[str]:
    """Chats the tokenizer is trained on; words matter here, not which split a problem is in."""
    rng = random.Random(f"tokenizer {recipe.seed}")
    chat = Chat()
    for _ in range(recipe.corpus_problems):
        for family in FAMILIES.values():
            p = family.sample(rng, rng.randint(0, family.top), "train")
            yield render([("user", p.question), ("assistant", p.answer)])
        question, reply = chat.sample(rng)
        yield render([("user", question), ("assistant", reply)])
    for prompt in SYSTEM_PROMPTS:
        yield render([("system", prompt)]) * 200
