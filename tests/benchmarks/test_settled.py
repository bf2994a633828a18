"""The random checkpoint whose later loops move the state little."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.random_checkpoint import PRESETS, write_checkpoint

SHAPE = PRESETS["tiny"]


def weights(folder: Path, residual: float) -> dict[str, torch.Tensor]:
    written = write_checkpoint(folder, **SHAPE, dtype="float32", residual=residual)
    return load_file(written / "model.safetensors")


def test_residual_scales_what_a_loop_moves_and_nothing_else(tmp_path: Path) -> None:
    whole, part = (weights(tmp_path / str(r), r) for r in (1.0, 0.25))
    assert whole.keys() == part.keys()
    changed = set()
    for name, tensor in whole.items():
        if "layernorm_2" in name:
            expected = 0.25 * tensor
        elif name == "model.norm.weight":
            expected = 1 + 0.25 * (tensor - 1)
        else:
            expected = tensor
        assert torch.allclose(part[name], expected, atol=1e-6), name
        changed |= set() if torch.equal(part[name], tensor) else {name.rpartition(".")[0]}
    assert len(changed) == 2 * SHAPE["num_hidden_layers"] + 1
