"""`python -m ouro_runtime.training.adapter`: an example of a LoRA adapter for `ouro-mini`.

With it the model answers sums in a sentence: "It is 5." for "5". The adapter is written in PEFT's
layout, as `ouro-serve --enable-lora --lora-modules NAME=FOLDER` reads it.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ouro_runtime.training.data import Batch, Chunk, pack
from ouro_runtime.training.export import load
from ouro_runtime.training.model import LoopLM
from ouro_runtime.training.objectives import stage1_loss
from ouro_runtime.training.stage1 import Budget, token_losses
from ouro_runtime.training.tasks import FAMILIES
from ouro_runtime.training.tasks.base import Split
from ouro_runtime.training.tokenizer import render

SHIPPED = Path(__file__).resolve().parent.parent / "checkpoints/ouro-mini"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROWS, LENGTH = 32, 32
"""A sum of four digits and its answer, however it is asked, fits into a row."""
LEARNING_RATE = 5e-3
SUM = FAMILIES["sum"]


class LowRank(nn.Module):
    """W [out, in] plus alpha / rank times B [out, rank] A [rank, in]; B starts at zero."""

    def __init__(self, weight: Tensor, rank: int, alpha: int) -> None:
        super().__init__()
        out, into = weight.shape
        self.a = nn.Parameter(torch.randn(rank, into) * into**-0.5)
        self.b = nn.Parameter(torch.zeros(out, rank))
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.b @ self.a)


def adapt(model: LoopLM, rank: int, alpha: int) -> dict[str, LowRank]:
    """Freeze a model and give the linear layers of its block adapters, by the layers' names."""
    model.requires_grad_(False)
    adapters = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in TARGETS:
            adapters[name] = LowRank(module.weight, rank, alpha)
            parametrize.register_parametrization(module, "weight", adapters[name])
    return adapters


def save(adapters: dict[str, LowRank], folder: Path, rank: int, alpha: int) -> None:
    """Write adapters in PEFT's layout."""
    tensors = {}
    for name, adapter in adapters.items():
        for part, weight in (("A", adapter.a), ("B", adapter.b)):
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = weight.detach().contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "ouro-mini",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(TARGETS),
        "bias": "none",
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def sentence(answer: str) -> str:
    """What the adapted model says instead of an answer."""
    return f"It is {answer}."


def draw(tok: Tokenizer, rng: random.Random, split: Split) -> Chunk:
    """A sum of one to four digits and its answer in a sentence."""
    problem = SUM.sample(rng, rng.randint(0 if split == "train" else 1, 3), split)
    head = tok.encode(render([("user", problem.question)], reply=True)).ids
    tail = tok.encode(f"{sentence(problem.answer)}<|im_end|>\n").ids
    # Nothing has to predict the newline after <|im_end|>.
    return Chunk(head + tail, [("sum", 0, len(head), len(head) + len(tail) - 1)])


def batch(tok: Tokenizer, rng: random.Random, split: Split) -> Batch:
    """`ROWS` rows with a sum each."""
    return pack([[draw(tok, rng, split)] for _ in range(ROWS)], LENGTH)


def train(
    model: LoopLM, tok: Tokenizer, adapters: dict[str, LowRank], budget: Budget, seed: int
) -> int:
    """Train the adapters; returns the number of steps. Answers have the stand-in K/V that mode
    `skip` gives them, at a random threshold per row."""
    rng = random.Random(seed)
    parameters = [p for adapter in adapters.values() for p in adapter.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    began, steps = time.monotonic(), 0
    while (done := budget.progress(steps, time.monotonic() - began)) < 1:
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - done)
        drawn = batch(tok, rng, "train")
        with parametrize.cached():  # every loop has the same weights
            states = model(drawn.ids, drawn.bias, drawn.pick, drawn.thresholds(rng, full=0.25))
            loss, gate, _ = token_losses(model, states, drawn.target)
        optimizer.zero_grad()
        stage1_loss(loss, gate, beta=0.0).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        steps += 1
    return steps


@torch.no_grad()
def right(model: LoopLM, tok: Tokenizer, batches: int) -> float:
    """Share of held-out sums that are answered right, in a sentence, at full depth."""
    rng, good = random.Random("held out"), 0
    for _ in range(batches):
        drawn = batch(tok, rng, "test")
        states = model(drawn.ids, drawn.bias, drawn.pick)
        hit = token_losses(model, states, drawn.target)[2]
        good += sum(bool(hit[start:end].all()) for _, _, start, end in drawn.spans)
    return good / (batches * ROWS)


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="ouro_runtime.training.adapter", description=__doc__)
    p.add_argument("--out", type=Path, default=Path("runs/sentences"), help="adapter folder")
    p.add_argument("--minutes", type=float, default=1.0, help="training time")
    p.add_argument("--steps", type=int, help="steps, instead of --minutes")
    p.add_argument("--rank", type=int, default=8)
    p.add_argument("--alpha", type=int, default=16)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args(argv)
    torch.manual_seed(args.seed)
    model, tok = load(SHIPPED)
    adapters = adapt(model, args.rank, args.alpha)
    before = right(model, tok, 8)
    steps = train(model, tok, adapters, Budget(args.steps, args.minutes), args.seed)
    save(adapters, args.out, args.rank, args.alpha)
    print(
        f"{args.out}: {steps} steps; held-out sums answered right, in a sentence: "
        f"{before:.1%} before, {right(model, tok, 8):.1%} now"
    )


if __name__ == "__main__":
    main()
