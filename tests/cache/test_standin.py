"""Stand-in K/V, whatever the layout of a page."""

import numpy as np
import pytest
import torch

from ouro_runtime.cache.standin import StandIns, fill, probe_layout, raw

BLOCK, HEAD, HEADS, LOOPS, LAYERS, BLOCKS = 4, 8, 2, 4, 3, 5


def natural(key, value, page, slot):
    """K and V of a token side by side."""
    rows = page.view(-1, page.shape[1], BLOCK, 2 * HEAD)
    rows[slot // BLOCK, :, slot % BLOCK, :HEAD] = key
    rows[slot // BLOCK, :, slot % BLOCK, HEAD:] = value


def transposed(key, value, page, slot):
    """K as columns, then V as rows, as vLLM's CPU kernels do."""
    flat = page.view(-1, page.shape[1], BLOCK * 2 * HEAD)
    half = BLOCK * HEAD
    keys = flat[:, :, :half].unflatten(-1, (HEAD, BLOCK))
    values = flat[:, :, half:].unflatten(-1, (BLOCK, HEAD))
    keys[slot // BLOCK, :, :, slot % BLOCK] = key
    values[slot // BLOCK, :, slot % BLOCK] = value


POSITIONS = 14


class Book:
    """Two requests' pages, and what they should hold, filled position by position."""

    def __init__(self, write, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        cache = torch.randn(LAYERS, BLOCKS * LOOPS, HEADS, BLOCK, 2 * HEAD, generator=generator)
        self.write = write
        self.pages = cache.to(dtype)
        self.expected = self.pages.clone()
        self.places = probe_layout(write, BLOCK, HEAD, dtype).numpy()
        self.stand_ins = StandIns(LOOPS, POSITIONS, BLOCK)
        pages = np.random.default_rng(0).permutation(BLOCKS * LOOPS).astype(np.int32)
        table = np.array([[3, 0, 4, 0], [1, 2, 0, 0]])
        self.tables = pages.reshape(LOOPS, BLOCKS)[:, table]

    def expect(self, req: int, pos: int, depth: int, loop: int) -> None:
        """`pos` of request `req` left at `depth`; that stands for 0-based `loop`."""
        mine = torch.zeros(1, 1, BLOCK, 2 * HEAD)
        ones = torch.ones(1, 1, HEAD)
        self.write(ones, ones, mine, torch.tensor([pos % BLOCK]))
        where = mine[0, 0].bool()
        pages = self.tables[:, req, pos // BLOCK].tolist()
        held = self.expected[:, pages[depth - 1]][:, :, where]
        self.expected[:, pages[loop]][:, :, where] = held

    def overwrite(self) -> None:
        """Other K/V everywhere."""
        self.pages.copy_(torch.randn(self.pages.shape))
        self.expected.copy_(self.pages)

    def settle(self, slots: list[int], loops: list[int], limits: list[int]) -> None:
        debts = self.stand_ins.due(
            np.array(slots),
            np.array(loops),
            np.array(limits),
            self.tables,
            np.arange(len(slots)),
        )
        for layer in self.pages:
            fill(raw(layer), self.places, debts)


@pytest.mark.parametrize("write", [natural, transposed])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_deeper_loop_reads_the_exit_loop_of_what_left_before(write, dtype) -> None:
    book = Book(write, dtype)
    slots = [book.stand_ins.open(prompt=2), book.stand_ins.open(prompt=1)]
    left = {(0, 2): 1, (0, 3): 3, (0, 4): 2, (1, 1): 1, (1, 2): 1}
    for (req, pos), depth in left.items():
        book.stand_ins.owe(np.array([slots[req]]), np.array([pos]), np.array([depth]))
    assert torch.equal(book.pages, book.expected), "nothing is copied before it is read"
    book.settle(slots, [2, 1], [5, 3])
    for req, pos, loop in ((0, 2, 2), (0, 4, 2), (1, 1, 1), (1, 2, 1)):
        book.expect(req, pos, left[req, pos], loop)
    assert torch.equal(book.pages, book.expected)


def test_a_loop_is_paid_once_and_again_after_a_rewind() -> None:
    book = Book(natural, torch.float32)
    slot = book.stand_ins.open(prompt=1)
    book.stand_ins.owe(np.array([slot, slot]), np.array([1, 2]), np.array([1, 2]))
    book.settle([slot], [3], [2])
    book.expect(0, 1, 1, 3)
    assert torch.equal(book.pages, book.expected)
    book.overwrite()
    book.settle([slot], [3], [3])
    book.expect(0, 2, 2, 3)
    assert torch.equal(book.pages, book.expected), "position 1 was paid before"
    book.overwrite()
    for limit in (1, 3):
        book.settle([slot], [3], [limit])
    assert torch.equal(book.pages, book.expected), "who reads less takes nothing back"
    book.stand_ins.rewind(slot, 1)
    book.settle([slot], [3], [3])
    book.expect(0, 1, 1, 3)
    book.expect(0, 2, 2, 3)
    assert torch.equal(book.pages, book.expected)


def test_slots_are_used_again_and_forget() -> None:
    book = Book(natural, torch.float32)
    slots = [book.stand_ins.open(prompt=1) for _ in range(5)]
    assert len(set(slots)) == 5
    book.stand_ins.owe(np.array(slots), np.full(5, 3), np.full(5, 1))
    book.stand_ins.close(slots[2])
    assert book.stand_ins.open(prompt=1) == slots[2]
    book.settle([slots[2]], [3], [5])
    assert torch.equal(book.pages, book.expected)
    book.settle([slots[4]], [3], [5])
    book.expect(0, 3, 1, 3)
    assert torch.equal(book.pages, book.expected), "others keep theirs when the book grows"


def test_a_layout_that_loses_elements_is_refused() -> None:
    def lossy(key, value, page, slot):
        natural(key * 0, value, page, slot)

    with pytest.raises(RuntimeError, match="layout"):
        probe_layout(lossy, BLOCK, HEAD, torch.float32)


def test_in_a_folded_block_deeper_loops_read_what_they_would_of_pages_of_their_own() -> None:
    """The block's deepest position left at loop 2; debts are paid into that page alone."""
    plain, folded = Book(natural, torch.float32), Book(natural, torch.float32)
    for book in (plain, folded):
        slot = book.stand_ins.open(prompt=BLOCK)
        positions = np.arange(BLOCK, 2 * BLOCK)
        book.stand_ins.owe(np.full(BLOCK, slot), positions, np.array([1, 2, 1, 1]))
        book.settle([slot], [1], [BLOCK + 3])
        if book is folded:
            book.tables = book.tables.copy()
            book.tables[2:, 0, 1] = book.tables[1, 0, 1]
            freed = set(plain.tables[2:, 0, 1].tolist())
        for loop in (1, 2, 3):
            book.settle([slot], [loop], [2 * BLOCK])
    for loop in range(LOOPS):
        own, shared = (book.pages[:, book.tables[loop, 0, 1]] for book in (plain, folded))
        assert torch.equal(own, shared), loop
    before = Book(natural, torch.float32).pages
    for page in freed:
        assert torch.equal(folded.pages[:, page], before[:, page]), "somebody else's by now"
