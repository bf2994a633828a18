"""Seam: passes over batches with prompt chunks, through vLLM's own attention.

The rows of a request are one sequence of vLLM's attention call; its block table is that of the
loop the rows are at. The metadata is built anew for every pass: lengths and tables move.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata, build_slot_mappings_by_layer

from ouro_runtime.engine.cuda.backend import RowView
from ouro_runtime.engine.cuda.lanes import LaneBuffers

logger = logging.getLogger("vllm.ouro")

BOUND_IS_EXACT = ("FLASHINFER",)
"""Backends that take the host's upper bound of the lengths for the lengths. Without the bound they
read the lengths from the device."""


class RowPasses:
    """Runs `OuroForCausalLM.model` over the rows of a step.

    Args:
        block: the looped block. loops: T. tables: [max requests, B] int32, the runner's gathered
            logical block tables; not copied.
        attn_groups, kv_cache_config: the runner's. longest: positions of a request at most.
    """

    def __init__(
        self,
        block: Any,
        loops: int,
        tables: torch.Tensor,
        attn_groups: Sequence[Any],
        kv_cache_config: Any,
        longest: int,
    ) -> None:
        self.block, self.loops, self.tables = block, loops, tables
        self.attn_groups, self.kv_cache_config = attn_groups, kv_cache_config
        self.longest = longest
        self._pages = torch.zeros_like(tables)
        backends = {group.backend.get_name() for groups in attn_groups for group in groups}
        self._bounded = backends.isdisjoint(BOUND_IS_EXACT)
        if not self._bounded:
            logger.warning(
                "Ouro Serve: %s plans on the host, which waits for the device before every pass of "
                "a batch with prompt chunks; --attention-backend FLASH_ATTN does not",
                ", ".join(sorted(backends)),
            )

    def metadata(
        self,
        batch: Any,
        loop: torch.Tensor,
        seq_lens: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        for_capture: bool = False,
    ) -> dict[str, Any]:
        """Attention metadata by layer name.

        Args:
            batch: the runner's `InputBatch` of R requests and N tokens.
            loop, seq_lens: [R] int32, see `RowView`. positions, slots: [N or more] int64.
        """
        requests, tokens = batch.num_reqs, batch.num_tokens
        pages = self._pages[:requests]
        torch.mul(self.tables[:requests], self.loops, out=pages)
        pages.add_(loop[:, None])
        bound = (batch.seq_lens_cpu_upper_bound[:requests] + self.loops - 1).clamp(max=self.longest)
        return build_attn_metadata(
            attn_groups=self.attn_groups,
            num_reqs=requests,
            num_tokens=tokens,
            query_start_loc_gpu=batch.query_start_loc[: requests + 1],
            query_start_loc_cpu=torch.from_numpy(batch.query_start_loc_np[: requests + 1]),
            max_query_len=int(batch.num_scheduled_tokens.max()),
            seq_lens=seq_lens,
            max_seq_len=self.longest if for_capture else int(bound.max()),
            block_tables=(pages,),
            slot_mappings=slots[None],
            kv_cache_config=self.kv_cache_config,
            seq_lens_cpu_upper_bound=bound if self._bounded else None,
            positions=positions,
            is_prefilling=torch.from_numpy(batch.is_prefilling_np),
            for_cudagraph_capture=for_capture,
            req_idx=batch.idx_mapping_np,
        )

    def run(self, batch: Any, buffers: LaneBuffers, view: RowView) -> None:
        """One pass over `buffers.hidden`, in place. Runs inside vLLM's forward context."""
        context = get_forward_context()
        context.attn_metadata = self.metadata(
            batch, view.loop, view.seq_lens, view.positions, view.slots
        )
        context.slot_mapping = build_slot_mappings_by_layer(view.slots[None], self.kv_cache_config)
        # Compiled pieces read their input where it was when they were captured: in this buffer.
        hidden = buffers.hidden[: view.padded]
        out, _ = self.block(hidden, view.positions)
        hidden.copy_(out)
