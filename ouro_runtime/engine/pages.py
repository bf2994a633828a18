"""Seam: vLLM's hybrid allocator, with a K/V cache group for each loop.

vLLM makes the groups out of the layers' specs (`model/loop_cache.py`) and allocates, shares and
frees the pages of each. Here is what it does not know: which loops a request needs pages of, how
far those may be offered to the prefix cache, and the block tables of all loops as one array.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator, KVCacheCoordinator
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request
from vllm.v1.worker.block_table import MultiGroupBlockTable, SlotMappingMode

from ouro_runtime.engine.pin import check_parameters
from ouro_runtime.model.loop_cache import LoopSpec

check_parameters(FullAttentionManager.cache_blocks, "request", "num_tokens", "replay_boundaries")
check_parameters(FullAttentionManager.get_num_blocks_to_allocate, "request_id", "num_tokens")
check_parameters(FullAttentionManager.allocate_new_blocks, "request_id", "num_tokens")
check_parameters(FullAttentionManager._remove_blocks_in_range, "first_block", "last_block")
check_parameters(KVCacheCoordinator.get_num_blocks_to_allocate, "request_id", "num_tokens")
check_parameters(KVCacheCoordinator.allocate_new_blocks, "request_id", "num_tokens")
check_parameters(KVCacheCoordinator.remove_skipped_blocks, "request_id")
check_parameters(KVCacheManager.estimate_cached_tokens, "request")


class Book(Protocol):
    """What a manager asks of the scheduler."""

    def deepest(self, request_id: str) -> int:
        """The deepest loop, from 1, that any position of a request runs."""

    def held(self, request_id: str, loop: int, num_tokens: int) -> int:
        """Of the first positions of a request, how many need a place at `loop`, from 0."""

    def clean(self, request: Request, loop: int) -> int:
        """Leading positions of a request whose K/V at `loop`, from 0, may be shared."""


class LoopManager(FullAttentionManager):
    """Pages of one loop. `book` is the scheduler's to set, before the first request."""

    kv_cache_spec: LoopSpec
    book: Book

    def _held(self, request_id: str, num_tokens: int) -> int:
        return self.book.held(request_id, self.kv_cache_spec.loop, num_tokens)

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> int:
        held = self._held(request_id, num_tokens)
        return super().get_num_blocks_to_allocate(request_id, held, *args, **kwargs)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args: Any) -> list[Any]:
        return super().allocate_new_blocks(request_id, self._held(request_id, num_tokens), *args)

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        clean = self.book.clean(request, self.kv_cache_spec.loop)
        held = self._held(request.request_id, min(num_tokens, clean))
        super().cache_blocks(request, held, *args, **kwargs)

    def let_go(self, request_id: str) -> None:
        """Free a running request's pages; the prefix cache may offer them as before."""
        held = len(self.req_to_blocks.get(request_id, ()))
        self._remove_blocks_in_range(request_id, 0, held)


def register() -> None:
    """Tell vLLM of pages by loop; wherever it makes groups of layers."""
    # vLLM registers its own only while there are none.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(LoopSpec, LoopManager, uniform_type_base_spec=LoopSpec)


register()


def keep_book(manager: KVCacheManager, book: Book, loops: int) -> None:
    """Let vLLM's manager ask `book` about the loops of requests.

    Raises:
        ValueError: for an option that would share parts of pages.
    """
    managers = manager.coordinator.single_type_managers
    assert [type(one) for one in managers] == [LoopManager] * loops, managers
    assert [one.kv_cache_spec.loop for one in managers] == list(range(loops))
    for one in managers:
        if one.block_pool.hash_block_size != one.block_size:
            raise ValueError("--prefix-match-unit must be the block size: pages are shared whole")
        one.book = book

    def cached_tokens(request: Request) -> int:
        """vLLM's takes the loop that has fewest of all, also where a request has none."""
        name = request.request_id
        blocks = (one.num_cached_block.get(name, 0) for one in managers[: book.deepest(name)])
        return min(blocks) * managers[0].block_size

    manager.estimate_cached_tokens = cached_tokens  # type: ignore[method-assign]
    spare_calls(manager.coordinator, book)


def spare_calls(coordinator: Any, book: Book) -> None:
    """Let a coordinator of vLLM's ask no manager where nothing is to be done: most steps need no
    page and fill none, and to hear so from each loop took longer than the rest of scheduling.

    A request's deepest loop has a page for every block that any of its loops has one for; and its
    first loop is shared as far as any.
    """
    managers = coordinator.single_type_managers
    size = managers[0].block_size
    none: tuple[list[Any], ...] = tuple([] for _ in managers)
    count, allocate, cache = (
        getattr(coordinator, name)
        for name in ("get_num_blocks_to_allocate", "allocate_new_blocks", "cache_blocks")
    )

    def has_room(request_id: str, num_tokens: int) -> bool:
        held = managers[book.deepest(request_id) - 1].req_to_blocks.get(request_id, ())
        return 0 < num_tokens <= size * len(held)

    def count_missing(request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        if has_room(request_id, num_tokens):
            return 0
        return count(request_id, num_tokens, *args, **kwargs)

    def allocate_missing(request_id: str, num_tokens: int, *args: Any) -> tuple[list[Any], ...]:
        if has_room(request_id, num_tokens):
            return none
        return allocate(request_id, num_tokens, *args)

    def cache_new(request: Request, num_computed_tokens: int) -> None:
        cached = managers[0].num_cached_block.get(request.request_id, 0)
        if num_computed_tokens // size > cached:
            cache(request, num_computed_tokens)

    coordinator.get_num_blocks_to_allocate = count_missing
    coordinator.allocate_new_blocks = allocate_missing
    coordinator.cache_blocks = cache_new
    # No position is ever out of sight here.
    coordinator.remove_skipped_blocks = lambda *args, **kwargs: None


@contextmanager
def only_loops(coordinator: Any, deepest: int) -> Iterator[None]:
    """Let the prefix cache be asked for pages of the loops up to `deepest`, from 1, only."""
    if not isinstance(coordinator, HybridKVCacheCoordinator):  # no cache, or one loop
        yield
        return
    every = coordinator.attention_groups
    coordinator.attention_groups = every[:deepest]
    assert [group.spec.loop for group in coordinator.attention_groups] == list(range(deepest))
    try:
        yield
    finally:
        coordinator.attention_groups = every


def pages_held(manager: KVCacheManager) -> list[int]:
    """Pages that requests hold, by loop; one of a folded block is its own loop's."""
    counts, seen = [], {manager.block_pool.null_block.block_id}
    for loop in manager.coordinator.single_type_managers:
        before = len(seen)
        seen.update(page.block_id for pages in loop.req_to_blocks.values() for page in pages)
        counts.append(len(seen) - before)
    return counts


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
