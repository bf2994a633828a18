"""Stage II and the export, end to end on a tiny model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from ouro_runtime.training.export import export, load
from ouro_runtime.training.finish import finish
from ouro_runtime.training.model import LoopLM, LoopLMConfig
from ouro_runtime.training.objectives import stage2_loss
from ouro_runtime.training.recipe import Recipe
from ouro_runtime.training.stage1 import Budget, Stage1
from ouro_runtime.training.stage2 import States, train_gate


@pytest.mark.parametrize("target", ["paper", "shifted", "remaining"])
def test_gate_training_lowers_its_loss_and_touches_nothing_else(
    target: str, recipe: Recipe
) -> None:
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 500, 8, generator=gen)
    losses = (hidden[..., 0] > 0).float() * torch.tensor([1.0, 0.6, 0.2, 0.0])[:, None]
    states = States(hidden.clone(), losses.clone())
    start = (torch.zeros(8), torch.zeros(()))
    (weight, bias), _ = train_gate(states, start, target, recipe)  # type: ignore[arg-type]
    before = stage2_loss(hidden @ start[0] + start[1], losses, target)  # type: ignore[arg-type]
    after = stage2_loss(hidden @ weight + bias, losses, target)  # type: ignore[arg-type]
    assert after < 0.95 * before
    assert torch.equal(states.hidden, hidden) and torch.equal(states.losses, losses)
    assert (start[0] == 0).all()


def test_finish_changes_only_the_gate(recipe: Recipe, tok: Tokenizer, tmp_path: Path) -> None:
    trainer = Stage1(recipe, tok, torch.device("cpu"))
    trainer.run(Budget(steps=3), None)
    before = {n: p.clone() for n, p in trainer.model.state_dict().items()}
    finish(trainer, tmp_path, tmp_path / "export")
    model, _ = load(tmp_path / "export")
    changed = {n for n, p in model.state_dict().items() if not torch.equal(p, before[n])}
    assert changed == {"model.early_exit_gate.weight", "model.early_exit_gate.bias"}
    gates = np.load(tmp_path / "gates.npz")
    assert {k.split(".")[0] for k in gates.files} == {"stage1", "paper", "shifted", "remaining"}
    shipped = json.loads((tmp_path / "summary.json").read_text())["shipped_gate"]
    weight = model.state_dict()["model.early_exit_gate.weight"][0].numpy()
    assert np.array_equal(gates[f"{shipped}.weight"], weight)


def test_export_has_the_released_names_and_loads(tok: Tokenizer, tmp_path: Path) -> None:
    cfg = LoopLMConfig(600, 64, 96, 2, 2)
    model = LoopLM(cfg)
    export(model, tok, tmp_path / "ckpt")
    with safe_open(tmp_path / "ckpt/model.safetensors", "pt") as f:
        names = set(f.keys())
        assert all(f.get_tensor(n).dtype == torch.float32 for n in names)
    layer = {
        *(f"self_attn.{p}_proj.weight" for p in "qkvo"),
        *(f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")),
        *(f"input_layernorm{s}.weight" for s in ("", "_2")),
        *(f"post_attention_layernorm{s}.weight" for s in ("", "_2")),
    }
    assert names == {f"model.layers.{i}.{n}" for i in range(2) for n in layer} | {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.early_exit_gate.weight",
        "model.early_exit_gate.bias",
        "lm_head.weight",
    }
    again, _ = load(tmp_path / "ckpt")
    assert again.cfg == cfg
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert AutoTokenizer.from_pretrained(tmp_path / "ckpt").eos_token_id == 2
    assert not [p for p in tmp_path.iterdir() if p.name != "ckpt"], "no temporary folder is left"
