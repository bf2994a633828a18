"""ouro-mini in the 4-bit formats of other tools: the same numbers, packed as they pack them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file, save_file

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
GROUP = 32


def packed(values: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """[R, C] of 0..15 as [R, C / 8] int32, value j of eight at nibble `order[j]`."""
    shifts = 4 * torch.tensor(order, dtype=torch.int64)
    words = (values.long().view(len(values), -1, 8) << shifts).sum(2)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def gptq(values: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
    """A layer of [out, in] values of 0..15 with [out, groups] scales, as GPTQ's tools store it."""
    zeros = torch.full(scales.t().shape, 7)  # one less than the zero point
    return {
        "qweight": packed(values).t().contiguous(),
        "qzeros": packed(zeros),
        "scales": scales.t().contiguous(),
        "g_idx": (torch.arange(values.shape[1]) // GROUP).int(),
    }


def awq(values: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same as AWQ's tools store it."""
    return {
        "qweight": packed(values.t(), AWQ_ORDER),
        "qzeros": packed(torch.full(scales.t().shape, 8), AWQ_ORDER),
        "scales": scales.t().contiguous(),
    }


FORMATS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gptq": (gptq, {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}),
    "awq": (awq, {"bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
}


def repack(source: Path, target: Path, name: str) -> Path:
    """A `w4a16` checkpoint of groups of 32 in another format; returns `target`."""
    pack, said = FORMATS[name]
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": name, **said}
    (target / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    for key in [key for key in tensors if key.endswith(".weight_packed")]:
        layer = key.rpartition(".")[0]
        shape = torch.Size(tensors.pop(f"{layer}.weight_shape").tolist())
        values = unpack_from_int32(tensors.pop(key), 4, shape) + 8
        made = pack(values, tensors.pop(f"{layer}.weight_scale"))
        tensors |= {f"{layer}.{part}": tensor for part, tensor in made.items()}
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target
