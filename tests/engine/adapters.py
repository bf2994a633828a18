"""Random LoRA adapters in PEFT's layout, and the checkpoints that have them merged in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALPHA = 8
GATE = "early_exit_gate"
PREFIX = "base_model.model."

Gate = tuple[torch.Tensor, torch.Tensor]
"""Weight [1, H] and bias [1]."""


def random_gate(hidden: int, seed: int) -> Gate:
    """A gate that is about as often above a half as below."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, hidden, generator=generator), torch.zeros(1)


def write_adapter(
    folder: Path,
    checkpoint: str,
    *,
    seed: int,
    rank: int = 4,
    targets: Sequence[str] = ALL,
    gate: Gate | None = None,
) -> str:
    """An adapter for a checkpoint that changes what it says; returns the folder as a string.

    Args:
        gate: a whole exit gate to hold; `early_exit_gate` among the targets adapts the
            checkpoint's own.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in load_file(Path(checkpoint) / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in targets:
            out, into = weight.shape
            prefix = PREFIX + module
            a = torch.randn(rank, into, generator=generator) * into**-0.5
            b = torch.randn(out, rank, generator=generator) * 0.3
            tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": ALPHA, "target_modules": list(targets)}
    if gate is not None:
        config["modules_to_save"] = [GATE]
        for part, tensor in zip(("weight", "bias"), gate, strict=True):
            tensors[f"{PREFIX}model.{GATE}.{part}"] = tensor
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def merge(folder: Path, checkpoint: str, adapter: str) -> str:
    """The checkpoint with the adapter merged in; returns the folder as a string."""
    shutil.copytree(checkpoint, folder, copy_function=shutil.copyfile)
    tensors = load_file(folder / "model.safetensors")
    held = load_file(Path(adapter) / "adapter_model.safetensors")
    config = json.loads((Path(adapter) / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    for name in [name for name in held if "lora_A" in name]:
        key = name.removeprefix(PREFIX).replace(".lora_A", "")
        b = held[name.replace("lora_A", "lora_B")]
        tensors[key] = tensors[key] + scale * (b @ held[name])
    tensors |= {n.removeprefix(PREFIX): held[n] for n in held if "lora_" not in n}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)
