"""Rows go through their own adapters, in any order and number; those without one through none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from vllm.lora.layers import LoRAMapping

from ouro_runtime.engine.cpu.adapters import RowAdapters

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
