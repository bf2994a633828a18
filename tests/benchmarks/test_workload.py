"""What the benchmarks ask for, and the bounds they hold the answers against, by hand."""

import pytest

from benchmarks.http_clients import PROMPT, rows_owed
from benchmarks.load_report import percentile
from benchmarks.workload import (
    SHARES,
    agreement,
    bound,
    depth_lists,
    drafted,
    fit_line,
    reachable,
    read_outs,
)


@pytest.mark.parametrize("mean", SHARES)
def test_every_request_runs_the_same_loops_in_an_order_of_its_own(mean: float) -> None:
    lists = depth_lists(mean, tokens=32, requests=5)
    assert {sum(depths[1:]) for depths in lists} == {32 * mean}
    assert all(len(depths) == 33 and depths[0] == 4 for depths in lists)
    assert len({tuple(depths) for depths in lists}) == (1 if mean == 4 else 5)


def test_the_bound_of_free_tokens_is_the_ratio_of_loops() -> None:
    assert bound(0.0, 1.0, loops=4, mean=2.5) == 1.6
    assert bound(2.0, 1.0, loops=4, mean=2.0) == 1.5


def test_a_line_through_its_points() -> None:
    fixed, loop = fit_line({1: 3.0, 2: 5.0, 4: 9.0})
    assert (fixed, loop) == (pytest.approx(1.0), pytest.approx(2.0))


def test_one_request_is_read_out_once_a_token_and_many_in_every_pass() -> None:
    assert read_outs(2.5, batch=1) == pytest.approx(1.0)
    assert read_outs(2.5, batch=2) == pytest.approx(2.5 * (1 - 0.6**2))
    assert read_outs(2.5, batch=1000) == pytest.approx(2.5)


def test_what_is_reachable_pays_the_vocabulary_in_every_pass() -> None:
    """Four loops of 10 and a read-out of 2, against two passes of 10 that each read out for 1.5."""
    spread = reachable(2.0, 10.0, loops=4, mean=2.0, batch=1000, together=2.0, spread=1.5)
    assert spread == pytest.approx(42 / 23)
    alone = reachable(2.0, 10.0, loops=4, mean=2.0, batch=1, together=2.0, spread=2.0)
    assert alone == pytest.approx(bound(2.0, 10.0, loops=4, mean=2.0))


def test_agreement_ends_at_the_first_difference() -> None:
    assert agreement([[1, 2, 3, 4]], [[1, 2, 9, 4]]) == 0.5
    assert agreement([[1, 2], [3, 4]], [[1, 2], [3, 4]]) == 1.0


def test_cells_owed_count_the_prompt_at_every_loop_and_the_first_token_with_it() -> None:
    assert rows_owed([[4, 1, 2], [4, 3, 3]], loops=4) == 2 * PROMPT * 4 + 3 + 6


def test_percentiles_count_by_weight() -> None:
    paces = [(10.0, 1), (20.0, 8), (90.0, 1)]
    assert (percentile(paces, 0.5), percentile(paces, 0.95)) == (20.0, 90.0)
    assert percentile([], 0.5) is None
    assert percentile(paces, 0.05) == 10.0


def test_drafts_bring_nothing_where_rows_cost_and_all_where_weights_do() -> None:
    heads = {4: 0.0, 16: 0.0}
    assert drafted({8: 8.0, 32: 32.0}, heads, batch=8, loops=4, mean=1) == 1
    assert drafted({8: 5.0, 32: 5.0}, heads, batch=8, loops=4, mean=2) == 2
    # Half and half, and a product with the vocabulary as dear as a row: 4 x 12 + 8 to 2 x (20 + 8).
    dear = {4: 4.0, 16: 16.0}
    assert drafted({8: 12.0, 32: 36.0}, dear, batch=8, loops=4, mean=2) == 1
