"""Folded blocks, against the depths of every position."""

import random

import numpy as np
import pytest

from ouro_runtime.cache.folding import BlockDepths, fold_tables

BLOCK, LOOPS = 4, 4


@pytest.mark.parametrize("prompt", [1, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("deepest", [2, 4])
def test_blocks_are_folded_at_the_deepest_of_their_positions(prompt: int, deepest: int) -> None:
    rng = random.Random(prompt)
    blocks, computed = BlockDepths(prompt, BLOCK, deepest), prompt
    folds: list[tuple[int, int]] = []
    depths = [rng.randint(1, deepest) if rng.random() < 0.3 else 1 for _ in range(60)]
    at = [deepest] * prompt + depths[1:]
    taken = 0
    while taken < len(depths):
        count = rng.randint(0, 5)
        step = depths[taken : taken + count]
        taken += len(step)
        blocks.step(step)
        computed = prompt + max(0, taken - 1)
        folds += blocks.due(computed)
        assert all((block + 1) * BLOCK <= computed for block, _ in folds)
    full = [max(at[start : start + BLOCK]) for start in range(0, len(at) - BLOCK + 1, BLOCK)]
    wanted = [(block, depth) for block, depth in enumerate(full) if depth < deepest]
    assert folds == wanted
    assert len({depth for _, depth in wanted}) > 1 or deepest == 2
    assert not list(blocks.due(computed)), "each once"
    blocks.rewind()
    assert [f for end in range(computed + 1) for f in blocks.due(end)] == wanted


def test_no_block_with_a_position_of_the_prompt_or_one_in_flight_is_folded() -> None:
    blocks = BlockDepths(prompt=2, block_size=BLOCK, deepest=LOOPS)
    blocks.step([1] * 20)
    assert list(blocks.due(11)) == [(1, 1)]
    assert list(blocks.due(12)) == [(2, 1)]
    assert list(blocks.due(100)) == [(3, 1), (4, 1)], "depths of later positions are not known"


def test_deeper_entries_name_the_page_of_the_deepest_loop() -> None:
    lists = [[10 * loop + block for block in range(3)] for loop in range(3)] + [[]]
    rows = np.array([*lists[:3], [0] * 3], np.int32)
    fold_tables(lists, rows, 3, [(1, 1), (2, 2)])
    assert lists == [[0, 1, 2], [10, 1, 12], [20, 1, 12], []]
    assert rows[:3].tolist() == lists[:3] and not rows[3].any(), "a cap holds no page of loop 4"
    fold_tables(lists, None, 3, [(0, 2)])
    assert [table[0] for table in lists[:3]] == [0, 10, 10] and rows[2, 0] == 20
