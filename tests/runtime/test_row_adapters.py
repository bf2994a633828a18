"""Rows go through their own adapters, in any order and number; those without one through none. And
what an adapter may hold of the exit gate."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.lora.layers import LoRAMapping

from ouro_runtime.engine.cpu.adapters import RowAdapters
from ouro_runtime.engine.cpu.gates import Gate, changed
from ouro_runtime.exit.gate import halt_probability

IN, WIDTHS, RANK, SLOTS = 12, (8, 4), 3, 2


@pytest.fixture
def weights() -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """A and B of two slices for two slots, as vLLM stacks them."""
    generator = torch.Generator().manual_seed(0)
    a = tuple(torch.randn(SLOTS, 1, RANK, IN, generator=generator) for _ in WIDTHS)
    b = tuple(torch.randn(SLOTS, 1, width, RANK, generator=generator) for width in WIDTHS)
    return a, b


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "adapters", [[], [0], [7], [0, 0, 0], [5, 0, 7, 7, 0, 5, 5, 0], [7] * 40 + [0, 5] * 20]
)
def test_each_row_gets_what_its_adapter_adds(
    weights: tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]],
    adapters: list[int],
    dtype: torch.dtype,
) -> None:
    a, b = ([w.to(dtype) for w in part] for part in weights)
    rows = RowAdapters(torch.device("cpu"))
    rows.update_metadata(LoRAMapping((0, 5), (0, 5)), [7, 5], SLOTS + 1, 100)
    rows.place(np.array(adapters, np.int64))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(adapters), IN, generator=generator).to(dtype)
    before = torch.randn(len(adapters), sum(WIDTHS), generator=generator).to(dtype)
    y = before.clone()
    rows.add_lora_linear(y, x, tuple(a), tuple(b), 1.0, WIDTHS)
    for row, adapter in enumerate(adapters):
        if adapter == 0:
            assert torch.equal(y[row], before[row])
            continue
        slot = [7, 5].index(adapter)
        added = [
            bs[slot, 0].float() @ (as_[slot, 0].float() @ x[row].float())
            for as_, bs in zip(a, b, strict=True)
        ]
        wanted = before[row].float() + torch.cat(added)
        torch.testing.assert_close(
            y[row].float(), wanted, atol=1e-4 if dtype == torch.float32 else 0.1, rtol=0.02
        )


def test_a_step_without_adapters_adds_nothing() -> None:
    rows = RowAdapters(torch.device("cpu"))
    rows.update_metadata(LoRAMapping((0, 0), (0, 0)), [None, None], SLOTS + 1, 100)
    y = torch.ones(2, sum(WIDTHS))
    rows.add_lora_linear(y, torch.ones(2, IN), (), (), 1.0, ())
    assert torch.equal(y, torch.ones(2, sum(WIDTHS)))


def test_the_gate_of_a_row_is_its_adapters() -> None:
    """Adapter 7 has a gate of its own, 5 has not, 0 is none."""
    generator = torch.Generator().manual_seed(2)
    gate = Gate(torch.randn(1, IN, generator=generator), torch.tensor([0.5]))
    rows = RowAdapters(torch.device("cpu"))
    rows.gated = {7: SimpleNamespace(gate=gate), 5: SimpleNamespace(gate=None)}
    rows.update_metadata(LoRAMapping((0, 5), (0, 5)), [7, 5], SLOTS + 1, 100)
    adapters = [0, 7, 5, 7, 0]
    rows.place(np.array(adapters, np.int64))
    hidden = torch.randn(len(adapters), IN, generator=generator)
    halt = torch.full((len(adapters),), 0.25)
    rows.halt(hidden, halt)
    own = halt_probability(hidden, *gate)
    for row, adapter in enumerate(adapters):
        assert halt[row] == (own[row] if adapter == 7 else 0.25)


WEIGHT, BIAS = torch.arange(4.0).unsqueeze(0), torch.tensor([1.0])
A, B = torch.eye(2, 4), torch.tensor([[2.0, 4.0]])


def test_an_adapter_changes_the_gate_by_low_rank_or_brings_its_own() -> None:
    gate = changed(WEIGHT, BIAS, {"lora_A.weight": A, "lora_B.weight": B}, scale=0.5)
    assert torch.equal(gate.weight, WEIGHT + torch.tensor([[1.0, 2.0, 0.0, 0.0]]))
    assert torch.equal(gate.bias, BIAS)
    own = {"weight": -WEIGHT.bfloat16(), "bias": BIAS + 1}
    assert all(map(torch.equal, changed(WEIGHT, BIAS, own, 0.5), (-WEIGHT, BIAS + 1)))
    assert torch.equal(changed(WEIGHT, BIAS, {"weight": WEIGHT}, 0.5).bias, BIAS)


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ({"lora_A.weight": A}, r"lora_B\.weight is missing"),
        ({"bias": BIAS}, r"early_exit_gate\.weight is missing"),
        ({"weight": WEIGHT, "lora_A.weight": A, "lora_B.weight": B}, "gate.weight: of an exit"),
        ({"weight": WEIGHT, "lora_bias": BIAS}, "gate.lora_bias: of an exit gate"),
        ({"weight": WEIGHT.T}, r"gate\.weight is \(4, 1\), not \(1, 4\)"),
        ({"lora_A.weight": A, "lora_B.weight": B[:, :1]}, r"lora_B\.weight is \(1, 1\)"),
    ],
)
def test_what_is_no_gate_is_refused_by_name(held: dict[str, torch.Tensor], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        changed(WEIGHT, BIAS, held, 1.0)
