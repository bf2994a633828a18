"""Quantizes a checkpoint: 8 or 4 bits for the weights of the layers, rounded to nearest.

    python -m ouro_runtime.model.quantize /models/Ouro-1.4B /models/Ouro-1.4B-w4a16 --format w4a16

Writes the released layout with vLLM's own `compressed-tensors` in the place of the layers' linear
weights. Embedding, norms, exit gate and read-out stay as they are, bit for bit: so do the loops'
K/V and the depth a state leaves at.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ouro_runtime.model.checkpoint import (
    INDEX,
    NARROW,
    CheckpointError,
    Sizes,
    check_checkpoint,
    read_json,
    weight_files,
)

FORMATS = {
    "w8a8": ("W8A8", CompressionFormat.int_quantized),
    "w4a16": ("W4A16", CompressionFormat.pack_quantized),
}
"""Name -> compressed-tensors' scheme and how it is stored."""

GROUPS = (32, 64, 128)
"""Weights that may share a scale in `w4a16`; what vLLM's kernels have."""

UNTOUCHED = ["lm_head", "model.early_exit_gate"]


def scheme_of(name: str, group_size: int) -> QuantizationScheme:
    """compressed-tensors' scheme of a format's name."""
    scheme = preset_name_to_scheme(FORMATS[name][0], ["Linear"])
    if name == "w4a16":
        scheme.weights.group_size = group_size
    scheme.format = FORMATS[name][1].value
    return scheme


def quantized(
    weight: torch.Tensor, scheme: QuantizationScheme, narrow: bool
) -> dict[str, torch.Tensor]:
    """One linear layer's tensors, by the names that follow the layer's.

    Args:
        weight: [out, in]; `in` is a multiple of the group size.
        narrow: keep 8-bit weights within -63..63.
    """
    args = scheme.weights
    assert args is not None and args.symmetric
    size = args.group_size or weight.shape[1]
    groups = weight.float().view(weight.shape[0], -1, size)
    scale, _ = calculate_qparams(groups.amin(2), groups.amax(2), args)
    if narrow:
        # compressed-tensors divides by half of -128..127.
        scale *= 127.5 / NARROW
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    state = {"weight": weight.float(), "weight_scale": scale}
    state = compressor.compress(state, scheme)
    state["weight_scale"] = state["weight_scale"].to(weight.dtype)
    return {name: tensor.contiguous() for name, tensor in state.items()}


def quantize(source: Path, target: Path, name: str, group_size: int, narrow: bool) -> None:
    """Write the checkpoint `source` to the folder `target` in the format `name`.

    Raises:
        CheckpointError: for a `source` that is no complete checkpoint or quantized already, a size
            that the format does not divide, and a `target` with files in it.
    """
    check_checkpoint(source)
    config = read_json(source / "config.json")
    if config.get("quantization_config"):
        raise CheckpointError(f"checkpoint {source}: it is quantized already")
    linears = Sizes.of(config).linears()
    for layer, (_, width) in linears.items():
        if name == "w4a16" and width % group_size:
            raise CheckpointError(
                f"checkpoint {source}: {layer} has {width} inputs, no multiple of "
                f"--group-size {group_size}"
            )
    target.mkdir(parents=True, exist_ok=True)
    if any(target.iterdir()):
        raise CheckpointError(f"{target} is not empty")
    scheme = scheme_of(name, group_size)
    weights = weight_files(source)
    places: dict[str, str] = {}
    for file in weights:
        tensors = _quantize_file(file, set(linears), scheme, narrow)
        save_file(tensors, target / file.name, {"format": "pt"})
        shutil.copymode(file, target / file.name)
        places |= dict.fromkeys(tensors, file.name)
    if (source / INDEX).exists():
        (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}, indent=1))
    _write_config(config, target, scheme)
    for file in source.iterdir():
        if file.is_file() and file not in weights and not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)
    check_checkpoint(target)


def unpacked(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint that `quantize` wrote, by their released names: its layers'
    weights in float32, rounded as they are."""
    config = read_json(folder / "config.json")
    scheme = QuantizationScheme(**config["quantization_config"]["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    tensors: dict[str, torch.Tensor] = {}
    layers: dict[str, dict[str, torch.Tensor]] = {name: {} for name in Sizes.of(config).linears()}
    for file in weight_files(folder):
        for name, tensor in load_file(file).items():
            layer, _, part = name.rpartition(".")
            if layer in layers:
                layers[layer][part] = tensor
            else:
                tensors[name] = tensor
    for layer, parts in layers.items():
        parts["weight_scale"] = parts["weight_scale"].float()
        tensors[f"{layer}.weight"] = compressor.decompress(parts, scheme)["weight"]
    return tensors


def _quantize_file(
    file: Path, linears: set[str], scheme: QuantizationScheme, narrow: bool
) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(file, "pt") as source:
        for name in source.keys():  # noqa: SIM118 (no mapping)
            layer = name.rpartition(".")[0]
            tensor = source.get_tensor(name)
            if layer in linears:
                made = quantized(tensor, scheme, narrow)
                tensors |= {f"{layer}.{part}": value for part, value in made.items()}
            else:
                tensors[name] = tensor
    return tensors


def _write_config(config: dict[str, Any], target: Path, scheme: QuantizationScheme) -> None:
    said = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=scheme.format,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=UNTOUCHED,
    )
    config = config | {"quantization_config": said.model_dump(mode="json", exclude_none=True)}
    if scheme.format == CompressionFormat.pack_quantized.value:
        # The kernels of 4 bits compute in 16.
        stored = "dtype" if "dtype" in config else "torch_dtype"
        config |= {stored: "bfloat16" if config.get(stored) == "float32" else config.get(stored)}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a folder with a checkpoint")
    parser.add_argument("target", type=Path, help="a folder that does not exist yet, or is empty")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        required=True,
        help="w8a8: 8-bit weights and, as they come, inputs. w4a16: 4-bit weights",
    )
    parser.add_argument("--group-size", type=int, choices=GROUPS, default=32, help="of w4a16 (32)")
    parser.add_argument(
        "--narrow",
        action="store_true",
        help="w8a8 for processors without VNNI, which need weights within -63..63",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 2, and one line, for what cannot be quantized."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.narrow and options.format != "w8a8":
        parser.error("--narrow is for --format w8a8")
    try:
        quantize(options.source, options.target, options.format, options.group_size, options.narrow)
    except (CheckpointError, OSError) as error:
        print(f"quantize: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
