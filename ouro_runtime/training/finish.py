"""After Stage I: three gates on the same frozen model, and the export with one of them."""

import json
from pathlib import Path
from typing import get_args

import numpy as np

from ouro_runtime.training.export import export
from ouro_runtime.training.objectives import Target
from ouro_runtime.training.stage1 import Stage1
from ouro_runtime.training.stage2 import cache_states, gate_of, learned_levels, set_gate, train_gate

SHIPPED: Target = "remaining"
"""The target whose gate is exported; chosen by `make quality`, see the model card."""


def finish(trainer: Stage1, out: Path, folder: Path) -> None:
    """Stage II towards every target, from Stage I's gate; export with the `SHIPPED` one.

    `out/gates.npz` keeps all gates (`<name>.weight` [D], `<name>.bias` []), Stage I's as "stage1";
    `out/summary.json` what the model card needs."""
    model = trainer.model
    levels = learned_levels(trainer.curriculum)
    states = cache_states(model, trainer.source, levels, trainer.recipe)
    start = gate_of(model)
    gates = {"stage1": start}
    last = {}
    for target in get_args(Target):
        gates[target], last[target] = train_gate(states, start, target, trainer.recipe)
    np.savez(
        out / "gates.npz",
        **{f"{n}.weight": w.cpu().numpy() for n, (w, _) in gates.items()},
        **{f"{n}.bias": b.cpu().numpy() for n, (_, b) in gates.items()},
    )
    set_gate(model, gates[SHIPPED])
    export(model, trainer.source.tok, folder)
    summary = {
        "recipe": trainer.recipe.to_dict(),
        "steps": trainer.step,
        "tokens": trainer.tokens,
        "seconds": round(trainer.seconds),
        "levels": trainer.curriculum.levels,
        "stage2_levels": levels,
        "stage1_loss_per_loop": states.losses.mean(1).tolist(),
        "stage2_loss": last,
        "shipped_gate": SHIPPED,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))
