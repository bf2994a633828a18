"""Graph-bucket arithmetic."""

import pytest

from ouro_runtime.engine.cuda.buckets import (
    MOST_DRAFT_LANES,
    bucket_for,
    draft_lanes,
    pass_buckets,
)


def test_buckets_are_the_capture_sizes_that_fit_and_the_most_lanes() -> None:
    assert pass_buckets([1, 2, 4, 8, 16], 6) == (1, 2, 4, 6)
    assert pass_buckets([4, 2, 1, 2], 4) == (1, 2, 4)


def test_more_lanes_than_the_largest_capture_size_run_uncaptured() -> None:
    buckets = pass_buckets([1, 2, 4], 100)
    assert buckets == (1, 2, 4)
    assert bucket_for(buckets, 5) is None


def test_without_capture_sizes_there_are_no_buckets() -> None:
    assert pass_buckets([], 8) == ()
    assert bucket_for((), 1) is None


@pytest.mark.parametrize(("sizes", "lanes"), [([0, 1], 4), ([1], 0), ([-1], 1)])
def test_sizes_under_one_are_refused(sizes: list[int], lanes: int) -> None:
    with pytest.raises(ValueError):
        pass_buckets(sizes, lanes)


def test_a_batch_runs_in_the_smallest_bucket_that_holds_it() -> None:
    buckets = pass_buckets([1, 2, 4, 8, 16, 24, 32], 40)
    for lanes in range(1, 33):
        bucket = bucket_for(buckets, lanes)
        assert bucket is not None and bucket >= lanes
        assert all(other < lanes for other in buckets if other < bucket)


def test_drafts_have_as_many_lanes_as_a_pass_takes_for_nothing() -> None:
    assert draft_lanes([], 256, 4, True) == MOST_DRAFT_LANES
    assert draft_lanes([1, 2, 4, 512], 8, 4, True) == 32, "T of each request"
    assert draft_lanes([1, 2, 4, 16], 256, 4, True) == 16, "a larger step would run uncaptured"


@pytest.mark.parametrize(
    ("sizes", "loops", "drafts"), [([1, 2], 4, True), ([], 1, True), ([], 4, False)]
)
def test_where_nothing_is_drafted_there_are_none(
    sizes: list[int], loops: int, drafts: bool
) -> None:
    assert draft_lanes(sizes, 256, loops, drafts) == 0
