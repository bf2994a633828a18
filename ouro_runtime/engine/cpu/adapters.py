"""Seam: LoRA on CPU. Every row of a pass goes through its request's adapter, whatever its loop.

vLLM says once a step which row has which adapter; here a step has many passes over other rows each,
and there may be more of them than tokens were scheduled. And what vLLM does on CPU gathers an
adapter for every row ([rows, out, rank] floats), where a row without one gets the last slot's: its
index is -1. Here rows go adapter by adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from ouro_runtime.engine.pin import check_parameters
from ouro_runtime.exit.gate import halt_probability

check_parameters(PunicaWrapperCPU.__init__, "max_num_batched_tokens", "max_batches", "device")
check_parameters(PunicaWrapperCPU.update_metadata, "mapping", "lora_index_to_id")
check_parameters(PunicaWrapperCPU.add_lora_linear, "lora_a_stacked", "scale", "output_slices")


class RowAdapters(PunicaWrapperCPU):
    """Which rows go through which adapters, and going through them.

    Attributes:
        gated: adapters by id; `gate` of each, weight [1, H] and bias [1], may be None.
        lost: adapters, by id, that a step's rows should go through and cannot; see `gates.py`.
    """

    gated: Mapping[int, Any]
    lost: Mapping[int, str]

    def __init__(self, device: torch.device) -> None:
        super().__init__(max_num_batched_tokens=1, max_batches=1, device=device)
        self._slot_of: dict[int, int] = {}
        self._groups: list[tuple[int, int, torch.Tensor]] = []
        self.gated = {}
        self.lost = {}

    def update_metadata(
        self, mapping: Any, lora_index_to_id: Sequence[int | None], *_: Any, **__: Any
    ) -> None:
        """vLLM, once a step or when adapters changed places: who is in which slot."""
        self._slot_of = {
            adapter: slot for slot, adapter in enumerate(lora_index_to_id) if adapter is not None
        }
        self.place(np.array(mapping.index_mapping, np.int64))

    def place(self, adapters: np.ndarray) -> None:
        """The next rows are those of adapters [N] int64, by vLLM's ids; 0 is none, and so is what
        is lost."""
        self._groups = [
            (adapter, self._slot_of[adapter], torch.from_numpy(np.nonzero(adapters == adapter)[0]))
            for adapter in np.unique(adapters).tolist()
            if adapter > 0 and adapter not in self.lost
        ]

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **_: Any,
    ) -> None:
        """Add what the adapters add, in float32, to `y` [N, out] = W `x` [N, in], in place.

        Rows of an adapter stay finite, whatever it holds: their K/V lie in pages that others
        get next, and attention multiplies what is past their end by zero.

        Args:
            lora_a_stacked, lora_b_stacked: per slice of `y`, [slots, 1, rank, in] and [slots, 1,
                width, rank]; scales are in them.
        """
        for _adapter, slot, rows in self._groups:
            part = x.index_select(0, rows).float()
            start = 0
            for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                added = part @ a[slot, 0].float().T @ b[slot, 0].float().T
                y[:, start : start + width].index_add_(0, rows, (scale * added).to(y.dtype))
                start += width
            most = torch.finfo(y.dtype).max ** 0.5
            bounded = y.index_select(0, rows).nan_to_num_(0.0, most, -most).clamp_(-most, most)
            y.index_copy_(0, rows, bounded)

    def halt(self, hidden: torch.Tensor, halt: torch.Tensor) -> None:
        """Put into `halt` [N] what the adapters' own gates say of states [N, H], in place."""
        for adapter, _, rows in self._groups:
            gate = self.gated[adapter].gate if adapter in self.gated else None
            if gate is not None:
                halt[rows] = halt_probability(hidden.index_select(0, rows), *gate)
