"""What a CPU runs of quantized checkpoints, and what it says of the others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.platforms import current_platform

from ouro_runtime.engine import config_hook
from ouro_runtime.model import quantized
from ouro_runtime.model.checkpoint import NARROW, CheckpointError
from ouro_runtime.model.quantize import scheme_of


def compressed(weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


INT8, INT4 = {"num_bits": 8, "type": "int"}, {"num_bits": 4, "type": "int"}
W8A8, W4A16, W8A16, W4A8 = (
    compressed(INT8, INT8),
    compressed(INT4),
    compressed(INT8),
    compressed(INT4, INT8),
)
GPTQ, GPTQ8 = ({"quant_method": "gptq", "bits": bits, "group_size": 64} for bits in (4, 8))
AWQ, AWQ_OLD = {"quant_method": "awq", "bits": 4}, {"quant_method": "awq", "w_bit": 4}
FP8 = compressed({"num_bits": 8, "type": "float"}, {"num_bits": 8, "type": "float"})


def said(quantization: dict[str, Any], four_bits: bool = False, narrow: bool = False) -> str:
    """The refusal, or nothing."""
    try:
        quantized.check_quantization(quantization, four_bits, narrow)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("four_bits", [True, False])
def test_eight_bits_of_both_run_everywhere(four_bits: bool) -> None:
    assert said(W8A8, four_bits) == ""


@pytest.mark.parametrize("quantization", [W4A16, GPTQ, AWQ, AWQ_OLD], ids=str)
def test_four_bits_run_where_their_kernel_is(quantization: dict[str, Any]) -> None:
    assert said(quantization, four_bits=True) == ""
    text = said(quantization)
    assert text.startswith(f"4-bit weights ({quantization['quant_method']}) need AVX-512 on CPU.")
    assert text.endswith("8-bit weights and inputs (`python -m ouro_runtime.model.quantize "
                         "--format w8a8`)")  # fmt: skip
    assert said(quantization, narrow=True).endswith("--format w8a8 --narrow`)")


@pytest.mark.parametrize("quantization", [W8A16, GPTQ8, W4A8], ids=str)
def test_what_has_no_kernel_anywhere_is_told_what_has(quantization: dict[str, Any]) -> None:
    text = said(quantization, four_bits=True)
    assert "do not run on CPU. On this processor run: 16 and 32 bits" in text
    assert text.endswith(quantized.FOUR_BITS)


def test_what_is_not_about_integers_is_left_to_vllm() -> None:
    assert said(FP8) == said({"quant_method": "fp8"}) == ""


def test_schemes_are_read_as_they_are_written() -> None:
    for name, expected in (("w8a8", (8, 8)), ("w4a16", (4, None))):
        group = scheme_of(name, 32).model_dump(mode="json", exclude_none=True)
        whole = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
        assert quantized.integers(whole) == [expected]


def test_the_hook_asks_only_for_quantized_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    def config(said: Any) -> Any:
        hf_config = SimpleNamespace(quantization_config=said)
        return SimpleNamespace(model_config=SimpleNamespace(hf_config=hf_config))

    monkeypatch.setattr(quantized, "has_four_bits", lambda: False)
    config_hook.refuse_format(config(None))
    config_hook.refuse_format(config(W8A8))
    with pytest.raises(CheckpointError, match="AVX-512"):
        config_hook.refuse_format(config(W4A16))


def model(largest: int) -> nn.Module:
    linear = nn.Linear(2, 2, bias=False)
    weight = torch.tensor([[1, 2], [3, largest]], dtype=torch.int8)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return nn.Sequential(linear)


@pytest.mark.parametrize("largest", [-128, -NARROW - 1, NARROW + 1, 127])
def test_weights_that_would_overflow_are_refused(
    monkeypatch: pytest.MonkeyPatch, largest: int
) -> None:
    monkeypatch.setattr(quantized, "overflows", lambda: False)
    quantized.check_loaded(model(largest))
    monkeypatch.setattr(quantized, "overflows", lambda: True)
    quantized.check_loaded(model(max(-NARROW, min(NARROW, largest))))
    with pytest.raises(CheckpointError, match=r"VNNI.*0\.weight and 0 more.*--narrow"):
        quantized.check_loaded(model(largest))


@pytest.mark.skipif(not current_platform.is_cpu(), reason="the CPU build's kernel")
def test_narrow_weights_never_overflow_and_the_probe_finds_it_where_others_do() -> None:
    """The largest sums that there can be, through vLLM's own product."""
    off = {largest: quantized.worst_error(largest) for largest in (NARROW, 127)}
    assert off[NARROW] < 1e-3 * 64 * NARROW
    assert quantized.overflows() == (off[127] > 1e-3 * 64 * 127)
