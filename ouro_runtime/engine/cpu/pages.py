"""Seam: vLLM's hybrid allocator, with a K/V cache group for each loop.

vLLM makes the groups out of the layers' specs (`model/loop_cache.py`) and allocates, shares and
frees the pages of each. Here is what it does not know: how far the pages of a loop may be offered
to the prefix cache, and the block tables of all loops as one array.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request
from vllm.v1.worker.block_table import MultiGroupBlockTable, SlotMappingMode

from ouro_runtime.engine.pin import check_parameters
from ouro_runtime.model.loop_cache import LoopSpec

check_parameters(FullAttentionManager.cache_blocks, "request", "num_tokens", "replay_boundaries")


class Book(Protocol):
    """What a manager asks of the scheduler."""

    def clean(self, request: Request, loop: int) -> int:
        """Leading positions of a request whose K/V at `loop`, from 0, may be shared."""


class LoopManager(FullAttentionManager):
    """Pages of one loop. `book` is the scheduler's to set, before the first request."""

    kv_cache_spec: LoopSpec
    book: Book

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        clean = self.book.clean(request, self.kv_cache_spec.loop)
        super().cache_blocks(request, min(num_tokens, clean), *args, **kwargs)


# vLLM registers its own only while there are none.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(LoopSpec, LoopManager, uniform_type_base_spec=LoopSpec)


def keep_book(coordinator: Any, book: Book, loops: int) -> None:
    """Give the managers of a coordinator of vLLM's their book.

    Raises:
        ValueError: for an option that would share parts of pages.
    """
    managers = coordinator.single_type_managers
    assert [type(manager) for manager in managers] == [LoopManager] * loops, managers
    assert [manager.kv_cache_spec.loop for manager in managers] == list(range(loops))
    for manager in managers:
        if coordinator.block_pool.hash_block_size != manager.block_size:
            raise ValueError("--prefix-match-unit must be the block size: pages are shared whole")
        manager.book = book


def join_tables(tables: MultiGroupBlockTable) -> np.ndarray:
    """[T, R, B] int32: the block tables of the groups, which are parts of it from now on.

    Their slots are not computed any more: each pass has its own.
    """
    buffers = [table.block_table for table in tables.block_tables]
    joined = torch.zeros(len(buffers), *buffers[0].cpu.shape, dtype=buffers[0].cpu.dtype)
    for table, part in zip(tables.block_tables, joined, strict=True):
        table.slot_mapping_mode = SlotMappingMode.NONE
        table.block_table.cpu = table.block_table.gpu = part
        table.block_table.np = part.numpy()
    return joined.numpy()
