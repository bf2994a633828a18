"""vLLM's allocator with a group for each loop, without an engine."""

from __future__ import annotations

import functools
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, UniformTypeKVCacheSpecs
from vllm.v1.request import RequestStatus

from ouro_runtime.engine import admission, pages
from ouro_runtime.model.loop_cache import LoopSpec

LOOPS, BLOCK, PAGES = 4, 32, 200


def spec(loop: int) -> LoopSpec:
    return LoopSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32, loop=loop)


class Book:
    """Requests by their deepest loop; the first 64 positions of each may be shared."""

    def __init__(self) -> None:
        self.loops: dict[str, int] = {}

    def deepest(self, request_id: str) -> int:
        return self.loops[request_id]

    def held(self, request_id: str, loop: int, num_tokens: int) -> int:
        return num_tokens if loop < self.loops[request_id] else 0

    def clean(self, request: Any, loop: int) -> int:
        return 2 * BLOCK


def make_manager(book: Book) -> KVCacheManager:
    groups = [KVCacheGroupSpec([f"layer.loop{loop}"], spec(loop)) for loop in range(LOOPS)]
    config = KVCacheConfig(num_blocks=PAGES, kv_cache_tensors=[], kv_cache_groups=groups)
    manager = KVCacheManager(
        config, max_model_len=4096, scheduler_block_size=BLOCK, hash_block_size=BLOCK
    )
    pages.keep_book(manager, book, LOOPS)
    return manager


def make_request(name: str, known: int, prompt: int = 0) -> Any:
    """What the allocator reads of a request; prompts of one number begin alike."""
    return SimpleNamespace(
        request_id=name,
        num_computed_tokens=0,
        num_tokens=known,
        num_prompt_tokens=known,
        num_in_flight_tokens=0,
        num_preemptions=0,
        status=RequestStatus.RUNNING,
        shared_prefix_boundary=0,
        skip_reading_prefix_cache=False,
        block_hashes=[bytes([prompt, place]) * 16 for place in range(40)],
        lora_request=None,
        mm_features=[],
    )


def test_layers_are_grouped_by_loop() -> None:
    specs = {f"{layer}.loop{loop}": spec(loop) for layer in range(3) for loop in range(LOOPS)}
    assert not kv_cache_utils.is_kv_cache_spec_uniform(specs)
    assert UniformTypeKVCacheSpecs.from_specs(specs) is None
    groups = kv_cache_utils._get_kv_cache_groups_uniform_page_size(specs)
    assert [group.kv_cache_spec for group in groups] == [spec(loop) for loop in range(LOOPS)]
    for loop, group in enumerate(groups):
        assert group.layer_names == [f"{layer}.loop{loop}" for layer in range(3)]


def test_pages_of_loops_that_are_not_needed_are_neither_taken_nor_asked_for() -> None:
    book = Book()
    manager = make_manager(book)
    free = manager.block_pool.get_num_free_blocks()
    for name, loops in (("two", 2), ("four", 4)):
        book.loops[name] = loops
        request = make_request(name, 3 * BLOCK)
        with pages.only_loops(manager.coordinator, loops):
            found, hit, _ = manager.get_computed_blocks(request)
        assert hit == 0, "pages of two loops do not serve four"
        assert manager.allocate_slots(request, 3 * BLOCK, hit, found)
    assert pages.pages_held(manager) == [6, 6, 3, 3]
    assert manager.block_pool.get_num_free_blocks() == free - 18
    book.loops["later"] = 1
    with pages.only_loops(manager.coordinator, 1):
        found, hit, _ = manager.get_computed_blocks(make_request("later", 3 * BLOCK))
    assert hit == 2 * BLOCK, "no further than what may be shared"
    assert [len(loop) for loop in found.blocks] == [2, 0, 0, 0]


def test_pages_that_are_let_go_are_free_and_found_again() -> None:
    book = Book()
    manager = make_manager(book)
    book.loops |= {"first": LOOPS, "second": LOOPS}
    request = make_request("first", 2 * BLOCK + 1)
    manager.allocate_slots(request, 2 * BLOCK + 1)
    free = manager.block_pool.get_num_free_blocks()
    for loop in manager.coordinator.single_type_managers[:-1]:
        assert isinstance(loop, pages.LoopManager)
        loop.let_go("first")
    assert pages.pages_held(manager) == [0, 0, 0, 3]
    assert manager.block_pool.get_num_free_blocks() == free + 9
    found, hit, _ = manager.get_computed_blocks(make_request("second", 2 * BLOCK + 1))
    assert hit == 2 * BLOCK and [len(loop) for loop in found.blocks] == [2] * LOOPS


def test_calls_that_are_spared_would_have_done_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A manager that is asked every time allocates and shares the same pages."""
    book = Book()
    quick = make_manager(book)
    monkeypatch.setattr(pages, "spare_calls", lambda *_: None)
    asked = make_manager(book)
    rng = random.Random(3)
    running: list[tuple[Any, Any]] = []
    for number in range(400):
        if not running or rng.random() < 0.1:
            known, prompt = rng.randint(1, 150), rng.randrange(3)
            name = f"r{number}"
            book.loops[name] = rng.randint(1, LOOPS)
            pair = make_request(name, known, prompt), make_request(name, known, prompt)
            took = []
            for manager, request in zip((quick, asked), pair, strict=True):
                with pages.only_loops(manager.coordinator, book.loops[name]):
                    found, hit, _ = manager.get_computed_blocks(request)
                took.append(
                    manager.allocate_slots(request, known - hit, hit, found, num_lookahead_tokens=6)
                )
                request.num_computed_tokens = known
            assert (took[0] is None) == (took[1] is None)
            if took[0] is not None:
                running.append(pair)
        for pair in list(running):
            gone = rng.random() < 0.03
            for manager, request in zip((quick, asked), pair, strict=True):
                request.num_tokens += 1
                new = manager.allocate_slots(request, 1, num_lookahead_tokens=6)
                request.num_computed_tokens += 1
                if new is None or gone:
                    manager.free(request)
            if new is None or gone:
                running.remove(pair)
        for _, request in running:
            ids = [manager.get_block_ids(request.request_id) for manager in (quick, asked)]
            assert ids[0] == ids[1]
    assert len(book.loops) > 20


@pytest.mark.parametrize(("loops", "fits"), [(LOOPS, True), (1, False)])
def test_the_check_at_the_start_asks_for_one_loop(loops: int, fits: bool) -> None:
    """Of pages by loop; another model's groups need what they say."""
    groups = [KVCacheGroupSpec([f"{loop}"], spec(loop)) for loop in range(loops)]

    def needed_by(config: None, groups: list[KVCacheGroupSpec]) -> int:
        return 4000

    needed = functools.partial(needed_by, None, groups)
    ask = functools.partial(admission.check_one_loop, 1500, needed, 64, lambda memory: 7)
    if fits:
        ask()
    else:
        with pytest.raises(ValueError, match="estimated maximum model length is 7"):
            ask()
