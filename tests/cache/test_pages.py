"""Pages by loop and the clean prefix."""

import numpy as np
import pytest

from ouro_runtime.cache.pages import LoopPages
from ouro_runtime.cache.sharing import CleanPrefix

TABLES = np.array([[[3, 0, 5], [1, 2, 4]], [[8, 7, 6], [11, 10, 9]]], np.int32)
"""[T, R, B]"""


def test_a_cell_has_a_slot_of_its_own() -> None:
    pages = LoopPages(TABLES, block_size=2)
    cells = [(r, p, t) for r in range(2) for p in range(6) for t in range(2)]
    req, pos, loop = (np.array(column) for column in zip(*cells, strict=True))
    assert sorted(pages.slots(req, pos, loop).tolist()) == list(range(24))
    assert pages.slots(np.array([0]), np.array([5]), np.array([1])).tolist() == [6 * 2 + 1]


def test_tables_are_those_of_each_sequences_loop() -> None:
    tables = LoopPages(TABLES, block_size=2).tables(np.array([0, 1]), np.array([1, 0]), positions=3)
    assert tables.tolist() == [[8, 7], [1, 2]]
    assert tables.dtype == np.int32


def test_where_loops_share_what_is_generated_lies_in_the_last_ones_pages() -> None:
    pos, loop, prompt = np.array([2, 3, 2, 3]), np.array([0, 0, 1, 0]), np.full(4, 3)
    shared = np.array([True, True, True, False])
    planes = LoopPages(TABLES, block_size=2).planes(shared, prompt, pos, loop)
    assert planes.tolist() == [0, 1, 1, 0]


def test_skip_ends_the_clean_prefix_at_the_first_early_exit() -> None:
    clean = CleanPrefix(prompt=10, loops=4, mode="skip")
    assert clean.step([2]) == 10, "token 0 is read out at the prompt's last position"
    assert clean.step([4, 4]) == 12
    assert clean.step([3]) == 12
    assert clean.step([4, 4]) == 12, "what follows a stand-in was computed from it"


def test_a_position_is_clean_at_the_loops_that_it_and_all_before_it_ran() -> None:
    clean = CleanPrefix(prompt=10, loops=4, mode="skip")
    clean.step([1, 4, 3, 4, 2, 4])
    assert clean.by_loop == [15, 15, 13, 11]


def test_exact_positions_count_one_step_late() -> None:
    clean = CleanPrefix(prompt=10, loops=4, mode="exact")
    assert clean.step([1, 1, 2]) == 10
    assert clean.step([]) == 12
    assert clean.step([4]) == 12
    assert clean.step([]) == 13


def test_in_shared_the_prompt_is_all_that_others_may_read() -> None:
    clean = CleanPrefix(prompt=10, loops=4, mode="shared")
    assert clean.step([4, 4, 4, 4]) == 10
    assert clean.by_loop == [10] * 4


@pytest.mark.parametrize("mode", ["skip", "exact", "lossless"])
def test_full_depth_keeps_everything(mode: str) -> None:
    clean = CleanPrefix(prompt=1, loops=2, mode=mode)
    for _ in range(5):
        clean.step([2])
    clean.step([])
    assert clean.length == 5
