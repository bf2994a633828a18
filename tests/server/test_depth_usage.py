"""The arithmetic of `usage.depth`."""

from __future__ import annotations

import pytest

from ouro_server.usage import DepthTally, TokenCounts, tokens_of
from tests.server.fakes import output


def test_usage_counts_tokens_loops_and_savings() -> None:
    tally = DepthTally(4)
    tally.add(map(TokenCounts, [4, 1, 2, 1], [4, 1, 2, 1]))
    usage = tally.usage()
    assert usage.mean == 2.0
    assert usage.histogram == {"1": 2, "2": 1, "3": 0, "4": 1}
    assert (usage.loops_run, usage.loops_skipped) == (8, 8)


def test_a_shallow_read_out_that_ran_all_loops_saves_nothing() -> None:
    tally = DepthTally(4)
    tally.add(map(TokenCounts, [1, 2], [4, 4]))
    assert (tally.usage().loops_run, tally.usage().loops_skipped) == (8, 0)


def test_no_tokens_have_no_mean() -> None:
    usage = DepthTally(3).usage()
    assert usage.mean is None
    assert usage.histogram == {"1": 0, "2": 0, "3": 0}
    assert (usage.loops_run, usage.loops_skipped) == (0, 0)


def test_merging_is_adding() -> None:
    both, first, second = DepthTally(4), DepthTally(4), DepthTally(4)
    both.add(map(TokenCounts, [1, 2, 3], [4, 2, 3]))
    first.add(map(TokenCounts, [1], [4]))
    second.add(map(TokenCounts, [2, 3], [2, 3]))
    first.merge(second)
    assert first.usage() == both.usage()


def test_misaligned_depths_are_an_error_not_a_guess() -> None:
    wrong = output([1, 2])
    wrong.depths = [1]
    with pytest.raises(RuntimeError, match="1 depths and 2 loop counts for 2 tokens"):
        tokens_of(wrong)


def test_a_wrong_draft_saves_nothing_and_claims_nothing() -> None:
    """Two drafts confirmed, one taken back with one behind it, and a token without a draft."""
    tally = DepthTally(4)
    tally.add([TokenCounts(1, 4, 1), TokenCounts(2, 4, 2), TokenCounts(4, 9, 3, 1)])
    tally.add([TokenCounts(4, 4)])
    usage = tally.usage()
    assert (usage.drafts_made, usage.drafts_right) == (4, 2)
    assert (usage.loops_run, usage.loops_skipped) == (21, 0)
