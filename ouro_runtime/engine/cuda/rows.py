"""Seam: passes over batches with prompt chunks, through vLLM's own attention.

The rows of a request are one sequence of vLLM's attention call; its block table is that of the
loop the rows are at. The metadata is built anew for every pass: lengths and tables move.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata, build_slot_mappings_by_layer

from ouro_runtime.engine.cuda.backend import RowPart, RowView
from ouro_runtime.engine.cuda.lanes import LaneBuffers

logger = logging.getLogger("vllm.ouro")

BOUND_IS_EXACT = ("FLASHINFER",)
"""Backends that take the host's upper bound of the lengths for the lengths. Without the bound they
read the lengths from the device."""


@dataclass
class RowBatch:
    """Some requests of a batch, as vLLM's `InputBatch` has them; only what is read here."""

    num_reqs: int
    num_tokens: int
    query_start_loc: torch.Tensor
    query_start_loc_np: np.ndarray
    num_scheduled_tokens: np.ndarray
    seq_lens_cpu_upper_bound: torch.Tensor
    is_prefilling_np: np.ndarray
    idx_mapping_np: np.ndarray


def parts(batch: Any, runs: np.ndarray, device: torch.device) -> list[RowPart | None]:
    """The rows of each pass; None for all.

    Args:
        batch: vLLM's `InputBatch`. runs: [T, R] bool, whose rows run.
    """
    found: list[RowPart | None] = []
    for step, running in enumerate(runs):
        if running.all():
            found.append(None)
        elif step and (running == runs[step - 1]).all():
            found.append(found[-1])
        else:
            found.append(_part(batch, running, device))
    return found


def _part(batch: Any, running: np.ndarray, device: torch.device) -> RowPart:
    """Of the requests that are `running` [R] bool."""

    def to_device(array: np.ndarray) -> torch.Tensor:
        return async_tensor_h2d(array, device=device)

    count = batch.num_scheduled_tokens
    requests, counts = np.nonzero(running)[0], count[running]
    first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    chosen = RowBatch(
        len(requests),
        int(first[-1]),
        to_device(first),
        first,
        counts,
        batch.seq_lens_cpu_upper_bound[: len(count)][torch.from_numpy(running)],
        batch.is_prefilling_np[running],
        batch.idx_mapping_np[running],
    )
    rows = np.nonzero(np.repeat(running, count))[0]
    return RowPart(to_device(rows), to_device(requests), chosen)


class RowPasses:
    """Runs `OuroForCausalLM.model` over the rows of a step.

    Args:
        block: the looped block. loops: T. tables: [T, max requests, B] int32, by loop, the page of
            each request's n-th block; not copied.
        attn_groups, kv_cache_config: the runner's, of which one loop's serve all: its layers run.
        longest: positions of a request at most.
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
        self.attn_groups, self.kv_cache_config = attn_groups[:1], copy.copy(kv_cache_config)
        self.kv_cache_config.kv_cache_groups = kv_cache_config.kv_cache_groups[:1]
        self.longest = longest
        self._pages = torch.zeros_like(tables[0])
        self._everyone = torch.arange(tables.shape[1], device=tables.device)
        backends = {group.backend.get_name() for groups in self.attn_groups for group in groups}
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
        lines: torch.Tensor | None = None,
    ) -> dict[str, Any]:
        """Attention metadata by layer name.

        Args:
            batch: the runner's `InputBatch` of R requests and N tokens, or a `RowBatch`.
            loop, seq_lens: [R] int32, see `RowView`. positions, slots: [N or more] int64.
            lines: [R] int64, the requests' lines of the block tables; None: in order.
        """
        requests, tokens = batch.num_reqs, batch.num_tokens
        pages = self._pages[:requests]
        lines = self._everyone[:requests] if lines is None else lines
        chosen = loop * self.tables.shape[1] + lines
        torch.index_select(self.tables.flatten(0, 1), 0, chosen, out=pages)
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
        context, part = get_forward_context(), view.part
        # Compiled pieces read their input where it was when they were captured: in this buffer.
        hidden, lines = buffers.hidden[: view.padded], None
        loop, seq_lens, positions, slots = view.loop, view.seq_lens, view.positions, view.slots
        if part is not None:
            batch, lines = part.batch, part.requests
            loop, seq_lens = loop[lines], seq_lens[lines]
            hidden, positions, slots = (x[part.rows] for x in (hidden, positions, slots))
            # No graph was captured of so many rows as are left.
            context.cudagraph_runtime_mode = CUDAGraphMode.NONE
        context.attn_metadata = self.metadata(batch, loop, seq_lens, positions, slots, lines=lines)
        context.slot_mapping = build_slot_mappings_by_layer(slots[None], self.kv_cache_config)
        out, _ = self.block(hidden, positions)
        if part is None:
            hidden.copy_(out)
        else:
            buffers.hidden.index_copy_(0, part.rows, out)
