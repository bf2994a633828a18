"""Seam: an adapter may hold the exit gate, changed by LoRA or whole (PEFT's `modules_to_save`).

To vLLM the gate is no layer that takes LoRA, and `modules_to_save` is for classifiers. So the model
names it as something that vLLM's loader skips (`lora_skip_prefixes`), and it is read here.

What does not fit the model is refused here too, before anything of it is in place; and an adapter
that was loaded anew under its name is not loaded anew by every step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple
from unittest import mock
from weakref import WeakValueDictionary

import torch
from msgspec import structs
from vllm.lora import worker_manager
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.utils import is_in_target_modules

from ouro_runtime.engine.pin import check_parameters
from ouro_runtime.model.adapter import check_layers, check_tensor
from ouro_runtime.model.checkpoint import Shape, Sizes

check_parameters(LoRAModel.from_lora_tensors, "tensors", "peft_helper", "skip_prefixes")
check_parameters(LoRALayerWeights.create_dummy_lora_weights, "input_dim", "rank", "device")
check_parameters(PEFTHelper.get_rank_and_scaling, "module_name")
check_parameters(worker_manager.WorkerLoRAManager.__init__, "lora_model_cls")
check_parameters(worker_manager.LRUCacheWorkerLoRAManager._load_adapter, "lora_request")
check_parameters(worker_manager.LRUCacheWorkerLoRAManager._apply_adapters, "lora_requests")

NAME = "early_exit_gate"
MODULE = f"model.{NAME}"
SKIPPED = f"{MODULE}."
LOW_RANK, WHOLE = ("lora_A.weight", "lora_B.weight"), ("weight", "bias")


class Gate(NamedTuple):
    """An exit gate in float32: weight [1, H], bias [1]."""

    weight: torch.Tensor
    bias: torch.Tensor


class GatedLoRA(LoRAModel):
    """vLLM's adapter, and what it holds of the gate.

    Attributes:
        held: tensors of the gate, by the rest of their names. scale: of its B A.
        gate: the gate of its rows; None for the model's.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.held: dict[str, torch.Tensor] = {}
        self.scale = 1.0
        self.gate: Gate | None = None

    @classmethod
    def from_lora_tensors(
        cls,
        lora_model_id: int,
        tensors: dict[str, torch.Tensor],
        peft_helper: PEFTHelper,
        **options: Any,
    ) -> GatedLoRA:
        """As vLLM, which leaves out what it is told to skip."""
        adapter = super().from_lora_tensors(lora_model_id, tensors, peft_helper, **options)
        for name, tensor in tensors.items():
            _, found, rest = name.partition(SKIPPED)
            if found:
                adapter.held[rest.removeprefix("modules_to_save.")] = tensor
        adapter.scale = peft_helper.get_rank_and_scaling(MODULE)[1]
        if adapter.held and not adapter.loras:
            # vLLM takes no adapter without one; no layer has this name.
            nothing = LoRALayerWeights.create_dummy_lora_weights
            adapter.loras[MODULE] = nothing(MODULE, 1, 1, 1, torch.float32, "cpu")
        return adapter


class GateHelper(PEFTHelper):
    """An adapter's configuration as vLLM shall see it: without the gate."""

    modules_to_save: list[str] | None

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = [name for name in self.modules_to_save or () if name.rpartition(".")[2] != NAME]
        self.modules_to_save = whole or None


class GateManager(worker_manager.LRUCacheWorkerLoRAManager):
    """vLLM's manager of adapters.

    Attributes:
        gated: adapters that are loaded, by id; as long as vLLM keeps them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, lora_model_cls=GatedLoRA, **kwargs)
        self.gated: WeakValueDictionary[int, GatedLoRA] = WeakValueDictionary()

    def _load_adapter(self, lora_request: Any) -> GatedLoRA:
        with mock.patch.object(worker_manager, "PEFTHelper", GateHelper):
            adapter = super()._load_adapter(lora_request)
        config = self._adapter_manager.model.config.to_dict()
        layers = {name: layer for name, layer in adapter.loras.items() if name != MODULE}
        check_layers(layers, Sizes.of(config).linears())
        if adapter.held and is_in_target_modules(MODULE, self.lora_config.target_modules):
            own = self._adapter_manager.model.model.early_exit_gate
            adapter.gate = changed(own.weight, own.bias, adapter.held, adapter.scale)
        self.gated[adapter.id] = adapter
        return adapter

    def _apply_adapters(self, lora_requests: Iterable[Any]) -> None:
        """A step's adapters are in place; vLLM would read those that once replaced another from
        their files again."""
        super()._apply_adapters([structs.replace(r, load_inplace=False) for r in lora_requests])


def changed(
    weight: torch.Tensor, bias: torch.Tensor, held: Mapping[str, torch.Tensor], scale: float
) -> Gate:
    """The gate weight [1, H] and bias [1] with what an adapter holds of it: lora_A [rank, H] and
    lora_B [1, rank], which add scale B A, or a weight and perhaps a bias in their place.

    Raises:
        ValueError: naming the tensor that is missing, unknown, of another shape or not finite.
    """
    held = {name: tensor.float() for name, tensor in held.items()}
    low_rank = not set(held).isdisjoint(LOW_RANK)
    kind = LOW_RANK if low_rank else WHOLE
    for name in sorted(set(held) - set(kind)):
        raise ValueError(
            f"{SKIPPED}{name}: of an exit gate an adapter may hold {' and '.join(kind)}"
        )
    for name in sorted(set(kind) - set(held) - {"bias"}):
        raise ValueError(f"{SKIPPED}{name} is missing in the adapter")
    rank = max(1, held["lora_A.weight"].shape[:1].numel()) if low_rank else 0
    hidden = weight.shape[1]
    shapes: dict[str, Shape] = {"lora_A.weight": (rank, hidden), "lora_B.weight": (1, rank)}
    shapes |= {"weight": (1, hidden), "bias": (1,)}
    for name, tensor in held.items():
        check_tensor(f"{SKIPPED}{name}", tensor, shapes[name])
    if low_rank:
        whole = weight.float() + scale * (held["lora_B.weight"] @ held["lora_A.weight"])
        check_tensor(f"{SKIPPED}weight with the adapter's", whole, shapes["weight"])
        return Gate(whole, bias.float())
    return Gate(held["weight"], held.get("bias", bias.float()))
