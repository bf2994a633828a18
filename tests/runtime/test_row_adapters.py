"""Rows go through their own adapters, in any order and number; those without one through none. And
what an adapter may hold of the exit gate."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.lora.layers import LoRAMapping

from ouro_runtime.engine.cpu import gates
from ouro_runtime.engine.cpu.adapters import RowAdapters
from ouro_runtime.engine.cpu.gates import Gate, changed
from ouro_runtime.exit.gate import halt_probability
from ouro_runtime.model.adapter import check_layers

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
    rows.add_lora_linear(y, x, tuple(a), tuple(b), 0.5, WIDTHS)
    for row, adapter in enumerate(adapters):
        if adapter == 0:
            assert torch.equal(y[row], before[row])
            continue
        slot = [7, 5].index(adapter)
        added = [
            bs[slot, 0].float() @ (as_[slot, 0].float() @ x[row].float())
            for as_, bs in zip(a, b, strict=True)
        ]
        wanted = before[row].float() + 0.5 * torch.cat(added)
        torch.testing.assert_close(
            y[row].float(), wanted, atol=1e-4 if dtype == torch.float32 else 0.1, rtol=0.02
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_overflows_in_an_adapter_stays_finite_in_its_rows(
    weights: tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]], dtype: torch.dtype
) -> None:
    """Or its K/V would spoil the answers of whoever gets its pages next."""
    a, b = ([1e30 * w.to(dtype) for w in part] for part in weights)
    for part in b:
        part[1] /= 1e30
    rows = RowAdapters(torch.device("cpu"))
    rows.update_metadata(LoRAMapping((0, 5), (0, 5)), [7, 5], SLOTS + 1, 100)
    rows.place(np.array([7, 0, 5], np.int64))
    x = torch.ones(3, IN, dtype=dtype)
    y = torch.full((3, sum(WIDTHS)), torch.inf, dtype=dtype)
    y[2] = 0
    rows.add_lora_linear(y, x, tuple(a), tuple(b), 1.0, WIDTHS)
    assert (y[[0, 2]].float() ** 2).isfinite().all(), "a norm squares it"
    assert y[1].isinf().all(), "a row without an adapter is nobody's business"


def test_a_step_without_adapters_adds_nothing() -> None:
    rows = RowAdapters(torch.device("cpu"))
    rows.update_metadata(LoRAMapping((0, 0), (0, 0)), [None, None], SLOTS + 1, 100)
    y = torch.ones(2, sum(WIDTHS))
    rows.add_lora_linear(y, torch.ones(2, IN), (), (), 1.0, ())
    assert torch.equal(y, torch.ones(2, sum(WIDTHS)))


def test_the_rows_of_a_lost_adapter_go_through_none() -> None:
    rows = RowAdapters(torch.device("cpu"))
    rows.lost = {9: "its files are gone"}
    rows.update_metadata(LoRAMapping((9, 0), (9, 0)), [None, None], SLOTS + 1, 100)
    y = torch.ones(2, sum(WIDTHS))
    rows.add_lora_linear(y, torch.ones(2, IN), (), (), 1.0, ())
    assert torch.equal(y, torch.ones(2, sum(WIDTHS)))
    with pytest.raises(KeyError):
        rows.place(np.array([8], np.int64))


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


@pytest.mark.parametrize("theirs", [{}, {9: "gone there"}, {7: "gone there"}])
@pytest.mark.parametrize("mine", [{}, {9: "gone here"}])
@pytest.mark.parametrize("loading", [(True, True), (False, True), (False, False)])
def test_an_adapter_that_one_rank_has_lost_all_have_lost(
    mine: dict[int, str],
    theirs: dict[int, str],
    loading: tuple[bool, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another rank that answers as torch would; without a load on either nothing is gathered."""
    gathered = []

    def all_reduce(flag: torch.Tensor, op: Any, group: Any) -> None:
        assert group == "the ranks"
        flag[0] = max(flag[0], int(loading[1]))

    def gather(into: list[Any], own: Any, group: Any) -> None:
        assert group == "the ranks"
        gathered.append(own)
        into[:] = [own, theirs]

    monkeypatch.setattr(gates.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(gates.distributed, "all_gather_object", gather)
    ranks = SimpleNamespace(world_size=2, cpu_group="the ranks")
    monkeypatch.setattr(gates, "get_tp_group", lambda: ranks)
    lost = gates.of_all_ranks(mine, loading[0])
    assert gathered == ([mine] if any(loading) else [])
    assert lost.keys() == (mine.keys() | theirs.keys() if any(loading) else mine.keys())


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
        ({"lora_A.weight": BIAS[0], "lora_B.weight": B}, r"lora_A\.weight is \(\), not"),
        ({"weight": WEIGHT * torch.nan}, r"gate\.weight holds what is not a finite number"),
        ({"weight": WEIGHT, "bias": BIAS / 0}, r"gate\.bias holds what is not a finite number"),
        ({"lora_A.weight": A * 3e38, "lora_B.weight": B}, "with the adapter's holds what is not"),
    ],
)
def test_what_is_no_gate_is_refused_by_name(held: dict[str, torch.Tensor], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        changed(WEIGHT, BIAS, held, 1.0)


LAYER = "model.layers.0.self_attn.q_proj"


def low_rank(**other: Any) -> SimpleNamespace:
    """What an adapter of rank 2 holds of a layer of [6, 4]."""
    holds = {"rank": 2, "scaling": 0.5, "lora_a": torch.ones(2, 4), "lora_b": torch.ones(6, 2)}
    return SimpleNamespace(**(holds | other))


def test_an_adapter_that_fits_is_taken() -> None:
    check_layers({LAYER: low_rank()}, {LAYER: (6, 4), "another": (1, 1)})


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"lora_a": torch.ones(2, 3)}, r"q_proj\.lora_A\.weight is \(2, 3\), not \(2, 4\)"),
        ({"lora_b": torch.ones(5, 2)}, r"q_proj\.lora_B\.weight is \(5, 2\), not \(6, 2\)"),
        ({"lora_a": torch.ones(3, 4), "lora_b": torch.ones(6, 3)}, r"\(3, 4\), not \(2, 4\)"),
        ({"lora_b": torch.ones(6, 3)}, r"lora_B\.weight is \(6, 3\), not \(6, 2\)"),
        ({"lora_a": torch.ones(4)}, r"lora_A\.weight is \(4,\), not"),
        ({"lora_b": None}, r"q_proj\.lora_B\.weight is missing in the adapter"),
        ({"lora_a": torch.full((2, 4), torch.nan)}, r"lora_A\.weight holds what is not a finite"),
        ({"lora_b": torch.full((6, 2), torch.inf)}, r"lora_B\.weight holds what is not a finite"),
        ({"scaling": float("nan")}, "lora_alpha over the rank is nan"),
    ],
)
def test_what_does_not_fit_a_layer_is_refused_by_name(other: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_layers({LAYER: low_rank(**other)}, {LAYER: (6, 4)})


def test_a_layer_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn.q_proj: the model has no such"):
        check_layers({LAYER: low_rank()}, {"model.layers.1.self_attn.q_proj": (6, 4)})
