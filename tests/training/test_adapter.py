"""The example of a LoRA adapter: it starts as nothing, learns, and is saved as it is."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from ouro_runtime.training import adapter
from ouro_runtime.training.data import Batch
from ouro_runtime.training.export import load
from ouro_runtime.training.model import LoopLM
from ouro_runtime.training.stage1 import Budget, token_losses
from tests.engine.adapters import merge


def logits(model: LoopLM, drawn: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model.lm_head(model(drawn.ids, drawn.bias, drawn.pick))


def loss(model: LoopLM, drawn: Batch) -> float:
    with torch.no_grad():
        states = model(drawn.ids, drawn.bias, drawn.pick)
        return float(token_losses(model, states, drawn.target)[0][-1].mean())


def test_it_starts_as_nothing_learns_and_is_saved_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, tok = load(adapter.SHIPPED)
    drawn = adapter.batch(tok, random.Random(0), "test")
    before = logits(model, drawn)
    adapters = adapter.adapt(model, rank=4, alpha=8)
    assert torch.equal(logits(model, drawn), before)

    first = loss(model, drawn)
    assert adapter.train(model, tok, adapters, Budget(steps=12, minutes=None), seed=0) == 12
    assert loss(model, drawn) < 0.5 * first

    adapter.save(adapters, tmp_path / "adapter", rank=4, alpha=8)
    merged, _ = load(
        Path(merge(tmp_path / "merged", str(adapter.SHIPPED), str(tmp_path / "adapter")))
    )
    torch.testing.assert_close(logits(merged, drawn), logits(model, drawn), atol=1e-4, rtol=1e-4)


def test_held_out_sums_are_never_trained_on() -> None:
    _, tok = load(adapter.SHIPPED)
    rng = random.Random(0)
    asked = {
        split: {tuple(adapter.draw(tok, rng, split).ids) for _ in range(100)}
        for split in ("train", "test")
    }
    assert not asked["train"] & asked["test"]
