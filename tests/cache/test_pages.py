"""Loop-interleaved pages and the clean prefix."""

import numpy as np
import pytest

from ouro_runtime.cache.pages import LoopPages
from ouro_runtime.cache.sharing import CleanPrefix


def test_a_cell_has_a_slot_of_its_own() -> None:
    table = np.array([[3, 0, 5], [1, 2, 4]], np.int32)
    pages = LoopPages(table, block_size=2, loops=3)
    cells = [(r, p, t) for r in range(2) for p in range(6) for t in range(3)]
    req, pos, loop = (np.array(column) for column in zip(*cells, strict=True))
    slots = pages.slots(req, pos, loop)
    assert len(set(slots.tolist())) == len(cells)
    assert pages.slots(np.array([0]), np.array([5]), np.array([1])).tolist() == [
        (5 * 3 + 1) * 2 + 1
    ]


def test_tables_name_the_pages_that_slots_lie_in() -> None:
    table = np.array([[3, 0, 5]], np.int32)
    pages = LoopPages(table, block_size=2, loops=4)
    tables = pages.tables(np.array([0, 0]), np.array([0, 2]), positions=5)
    assert tables.tolist() == [[12, 0, 20], [14, 2, 22]]
    assert tables.dtype == np.int32


def test_skip_ends_the_clean_prefix_at_the_first_early_exit() -> None:
    clean = CleanPrefix(prompt=10, loops=4, mode="skip")
    assert clean.step([2]) == 10, "token 0 is read out at the prompt's last position"
    assert clean.step([4, 4]) == 12
    assert clean.step([3]) == 12
    assert clean.step([4, 4]) == 12, "what follows a stand-in was computed from it"


def test_exact_positions_count_one_step_late() -> None:
    clean = CleanPrefix(prompt=10, loops=4, mode="exact")
    assert clean.step([1, 1, 2]) == 10
    assert clean.step([]) == 12
    assert clean.step([4]) == 12
    assert clean.step([]) == 13


@pytest.mark.parametrize("mode", ["skip", "exact", "lossless"])
def test_full_depth_keeps_everything(mode: str) -> None:
    clean = CleanPrefix(prompt=1, loops=2, mode=mode)
    for _ in range(5):
        clean.step([2])
    clean.step([])
    assert clean.length == 5
