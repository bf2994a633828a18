"""Seam: which quantized checkpoints the platform's vLLM runs, asked before and after weights load.

vLLM 0.32 on CPU: 4-bit weights have a kernel (`cpu_gemm_wna16`) in its builds for AVX-512 only, and
for 16-bit activations only; 8-bit weights have one (`onednn_scaled_mm`) everywhere, but on x86
without VNNI it adds products in 16 bits, and large weights overflow them without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from vllm import _custom_ops as ops

from ouro_runtime.model.checkpoint import NARROW, CheckpointError

RUN_HERE = (
    "On this processor run: 16 and 32 bits, and compressed-tensors with 8-bit weights and inputs "
    "(`python -m ouro_runtime.model.quantize --format w8a8"
)
FOUR_BITS = "4-bit weights of compressed-tensors (pack-quantized), GPTQ and AWQ"


def check_quantization(quantization: Mapping[str, Any], four_bits: bool, narrow: bool) -> None:
    """Return if a CPU runs what a checkpoint's `quantization_config` says, as far as it is about
    integers; other formats are vLLM's to judge.

    Args:
        four_bits: whether vLLM has its kernel for 4-bit weights here.
        narrow: whether 8-bit weights must be within -63..63 here.

    Raises:
        CheckpointError: naming the format and what does run.
    """
    method = quantization.get("quant_method")
    runs = RUN_HERE + (" --narrow`)" if narrow else "`)")
    if four_bits:
        runs += f", and {FOUR_BITS}"
    for bits, inputs in integers(quantization):
        if inputs is None and bits == 4 and four_bits:
            continue
        if inputs == 8 and bits == 8:
            continue
        kind = f"{bits}-bit weights" + ("" if inputs is None else f" and {inputs}-bit inputs")
        needs = " need AVX-512 on CPU" if inputs is None and bits == 4 else " do not run on CPU"
        raise CheckpointError(f"{kind} ({method}){needs}. {runs}")


def integers(quantization: Mapping[str, Any]) -> list[tuple[int, int | None]]:
    """Bits of weights, and of inputs if these are quantized, of every scheme of integers."""
    method = quantization.get("quant_method")
    if method in ("gptq", "awq"):
        return [(quantization.get("bits", quantization.get("w_bit")), None)]
    if method != "compressed-tensors":
        return []
    found = []
    for group in quantization.get("config_groups", {}).values():
        weights, inputs = group.get("weights"), group.get("input_activations")
        if weights and weights.get("type", "int") == "int":
            found.append((weights["num_bits"], inputs["num_bits"] if inputs else None))
    return found


def has_four_bits() -> bool:
    """Whether vLLM's build for this processor has its 4-bit kernel."""
    return hasattr(torch.ops._C, "cpu_gemm_wna16")


def overflows() -> bool:
    """Whether vLLM's 8-bit product loses here what does not fit into 16 bits, by trying one."""
    return worst_error(127) > 1


def worst_error(largest: int) -> float:
    """How far vLLM's product of 64 weights of `largest` and 64 inputs of 1 is from the sum."""
    weight = torch.full((16, 64), largest, dtype=torch.int8)
    # While a model loads, torch's default is the model's dtype.
    one = torch.ones(16, 1, dtype=torch.float32)
    handler = ops.create_onednn_scaled_mm(weight.t(), one, torch.float32, True, False)
    inputs, scales, _ = ops.onednn_scaled_int8_quant(
        torch.ones(1, 64, dtype=torch.float32), None, None, True
    )
    out = torch.empty(1, 16, dtype=torch.float32)
    adjust = weight.t().sum(0, keepdim=True, dtype=torch.float32)
    ops.onednn_scaled_mm(handler, inputs, out, scales, None, adjust, None)
    return float((out - 64 * largest).abs().max())


def check_loaded(model: nn.Module) -> None:
    """Refuse a loaded model whose 8-bit weights this processor would add up wrongly.

    Raises:
        CheckpointError: saying what to do.
    """
    wide = [
        name
        for name, weight in model.named_parameters()
        if weight.dtype == torch.int8 and max(weight.max(), -weight.min().int()) > NARROW
    ]
    if wide and overflows():
        raise CheckpointError(
            f"8-bit weights beyond {NARROW} need VNNI, which this processor does not have: sums "
            f"would overflow, in {wide[0]} and {len(wide) - 1} more. {RUN_HERE} --narrow`)"
        )
