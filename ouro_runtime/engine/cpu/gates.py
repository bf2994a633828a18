"""Seam: an adapter may hold the exit gate, changed by LoRA or whole (PEFT's `modules_to_save`).

To vLLM the gate is no layer that takes LoRA, and `modules_to_save` is for classifiers. So the model
names it as something that vLLM's loader skips (`lora_skip_prefixes`), and it is read here.

What does not fit the model is refused here too, before anything of it is in place; an adapter that
was loaded anew under its name is not loaded anew by every step; and one whose files are gone when a
step needs them is told of, instead of ending the engine.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple
from unittest import mock
from weakref import WeakValueDictionary

import torch
from msgspec import structs
from torch import distributed
from vllm.distributed.parallel_state import get_tp_group
from vllm.lora import worker_manager
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.utils import is_in_target_modules

from ouro_runtime.engine.core_process import reason
from ouro_runtime.engine.pin import check_parameters
from ouro_runtime.model.adapter import check_layers, check_tensor
from ouro_runtime.model.checkpoint import Shape, Sizes

check_parameters(LoRAModel.from_lora_tensors, "tensors", "peft_helper", "skip_prefixes")
check_parameters(LoRALayerWeights.create_dummy_lora_weights, "input_dim", "rank", "device")
check_parameters(PEFTHelper.get_rank_and_scaling, "module_name")
check_parameters(worker_manager.WorkerLoRAManager.__init__, "lora_model_cls")
check_parameters(worker_manager.LRUCacheWorkerLoRAManager._load_adapter, "lora_request")
check_parameters(worker_manager.LRUCacheWorkerLoRAManager._apply_adapters, "lora_requests")
check_parameters(worker_manager.LRUCacheWorkerLoRAManager.remove_adapter, "adapter_id")

logger = logging.getLogger(__name__)

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
        peft_helper: GateHelper,
        **options: Any,
    ) -> GatedLoRA:
        """As vLLM, which leaves out what it is told to skip.

        Raises:
            ValueError: where the configuration says that there is a gate and there is none.
        """
        adapter = super().from_lora_tensors(lora_model_id, tensors, peft_helper, **options)
        for name, tensor in tensors.items():
            _, found, rest = name.partition(SKIPPED)
            if found:
                adapter.held[rest.removeprefix("modules_to_save.")] = tensor
        if peft_helper.brings_gate and "weight" not in adapter.held:
            raise ValueError(
                f"adapter_config.json says that the adapter holds {NAME} whole (modules_to_save), "
                f"but there is no {SKIPPED}weight in it"
            )
        adapter.scale = peft_helper.get_rank_and_scaling(MODULE)[1]
        if adapter.held and not adapter.loras:
            # vLLM takes no adapter without one; no layer has this name.
            nothing = LoRALayerWeights.create_dummy_lora_weights
            adapter.loras[MODULE] = nothing(MODULE, 1, 1, 1, torch.float32, "cpu")
        return adapter


class GateHelper(PEFTHelper):
    """An adapter's configuration as vLLM shall see it: without the gate.

    Attributes:
        brings_gate: it says that the adapter holds a whole one.
    """

    modules_to_save: list[str] | None
    brings_gate = False

    def __post_init__(self) -> None:
        super().__post_init__()
        said = self.modules_to_save or []
        whole = [name for name in said if name.rpartition(".")[2] != NAME]
        self.brings_gate = whole != said
        self.modules_to_save = whole or None


class GateManager(worker_manager.LRUCacheWorkerLoRAManager):
    """vLLM's manager of adapters.

    Attributes:
        gated: adapters that are loaded, by id; as long as vLLM keeps them.
        lost: by id, why adapters of the running step could not be loaded. Their rows go through
            none, and their requests end (`scheduler.py`).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, lora_model_cls=GatedLoRA, **kwargs)
        self.gated: WeakValueDictionary[int, GatedLoRA] = WeakValueDictionary()
        self.lost: dict[int, str] = {}

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
        """As vLLM, without those that are `lost`; and it would read those that once replaced
        another from their files again."""
        kept = [r for r in lora_requests if r.lora_int_id not in self.lost]
        super()._apply_adapters([structs.replace(r, load_inplace=False) for r in kept])

    def bring(self, lora_requests: Iterable[Any]) -> None:
        """A step's adapters are in place, or `lost`: in vLLM one that gave its place to others, and
        cannot be read again, would end the engine."""
        self.lost.clear()
        asked = list(lora_requests)
        if not asked:
            return
        held = self.list_adapters()
        # First those that are here, so that none of them gives its place to another.
        self._apply_adapters([r for r in asked if r.lora_int_id in held])
        missing = [r for r in asked if r.lora_int_id not in held]
        lost = {}
        for request in missing:
            try:
                self._apply_adapters([request])
            except Exception as error:  # whatever is wrong with its files
                name = request.lora_name
                lost[request.lora_int_id] = (
                    f"LoRA adapter {name!r} cannot be loaded: {reason(error)}"
                )
        for adapter, why in of_all_ranks(lost, bool(missing)).items():
            logger.error("%s; its requests end", why)
            self.lost[adapter] = why
            self.remove_adapter(adapter)


def of_all_ranks(lost: dict[int, str], loaded: bool) -> dict[int, str]:
    """What any tensor-parallel rank has lost in this step, the same on all of them.

    Args:
        loaded: whether this rank had anything to load.
    """
    group = get_tp_group()
    if group.world_size == 1:
        return lost
    any_loaded = torch.tensor([loaded], dtype=torch.int32)
    distributed.all_reduce(any_loaded, distributed.ReduceOp.MAX, group=group.cpu_group)
    if not any_loaded:
        return lost
    everyones: list[dict[int, str]] = [{}] * group.world_size
    distributed.all_gather_object(everyones, lost, group=group.cpu_group)
    return {adapter: why for ranks in everyones for adapter, why in ranks.items()}


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
