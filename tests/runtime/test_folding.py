"""Folded blocks in vLLM's allocator, without an engine."""

from __future__ import annotations

import random
from typing import Any

from ouro_runtime.cache.folding import fold_tables
from ouro_runtime.engine import pages
from ouro_runtime.engine.cpu.folding import PageFolder
from tests.runtime.test_loop_groups import BLOCK, LOOPS, Book, make_manager, make_request


class PromptBook(Book):
    """Prompts may be shared, and nothing that is generated."""

    def clean(self, request: Any, loop: int) -> int:
        return request.num_prompt_tokens


def in_use(manager: Any) -> int:
    return manager.block_pool.num_gpu_blocks - 1 - manager.block_pool.get_num_free_blocks()


def test_pages_fall_by_what_no_position_went_to_and_all_come_back() -> None:
    """Requests of any depths, freed at any time; a worker's tables stay the allocator's."""
    rng, book = random.Random(5), PromptBook()
    manager = make_manager(book)
    folder = PageFolder(manager.coordinator.single_type_managers)
    running: dict[str, Any] = {}
    depths: dict[str, list[int]] = {}
    tables: dict[str, list[list[int]]] = {}
    folds = 0
    for number in range(3000):
        if len(running) < 3:
            name, prompt = f"r{number}", rng.randint(1, 70)
            book.loops[name] = rng.randint(1, LOOPS)
            request = make_request(name, prompt, number % 256)
            assert manager.allocate_slots(request, prompt, num_lookahead_tokens=3) is not None
            request.num_computed_tokens = prompt
            running[name], depths[name] = request, []
            tables[name] = [list(ids) for ids in manager.get_block_ids(name)]
            folder.open(name, prompt, book.loops[name])
        name = rng.choice(list(running))
        request, deepest = running[name], book.loops[name]
        new = manager.allocate_slots(request, 1, num_lookahead_tokens=3)
        assert new is not None
        for table, ids in zip(tables[name], new.get_block_ids(), strict=True):
            table += ids
        step = [
            rng.randint(1, deepest) if rng.random() < 0.05 else 1 for _ in range(rng.randint(0, 3))
        ]
        depths[name] += step
        request.num_computed_tokens = request.num_prompt_tokens + max(0, len(depths[name]) - 1)
        request.num_tokens = request.num_prompt_tokens + len(depths[name])
        folder.step(name, step)
        folder.fold(name, request.num_computed_tokens, deepest)
        for told, block in folder.take().items():
            fold_tables(tables[told], None, deepest, block)
            folds += len(block)
        assert [list(ids) for ids in manager.get_block_ids(name)] == tables[name]
        assert in_use(manager) == sum(
            needed(tables[one], running[one], depths[one], book.loops[one]) for one in running
        )
        assert sum(pages.pages_held(manager)) == in_use(manager)
        if len(depths[name]) > 150 or rng.random() < 0.003:
            manager.free(request)
            folder.free(name, finished=True)
            del running[name]
    assert folds > 30
    for name, request in running.items():
        manager.free(request)
        folder.free(name, finished=True)
    assert not in_use(manager) and folder.idle


def needed(tables: list[list[int]], request: Any, depths: list[int], deepest: int) -> int:
    """Pages of a request: for each full block as many as its deepest position has loops."""
    prompt, count = request.num_prompt_tokens, len(tables[0])
    at = [deepest] * prompt + depths[1:]
    full = len(at) // BLOCK
    return deepest * (count - full) + sum(
        max(at[block * BLOCK : (block + 1) * BLOCK]) for block in range(full)
    )
