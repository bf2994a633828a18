"""Limits and replays against counting by hand."""

import numpy as np
import pytest

from ouro_runtime.config import ExitParams
from ouro_runtime.loop.limits import (
    abreast,
    deepest_loop,
    depth_limits,
    last_readout,
    pages_per_token,
    replayed,
)
from ouro_runtime.loop.rows import Work


@pytest.mark.parametrize(
    ("mode", "forced", "asked", "deepest"),
    [
        ("skip", (), False, 2),
        ("exact", (), False, 2),
        ("skip", (3, 1), False, 3),
        ("skip", (), True, 4),
        ("shared", (), False, 4),
        ("lossless", (), False, 4),
    ],
)
def test_a_request_runs_the_loops_that_it_can_read(
    mode: str, forced: tuple[int, ...], asked: bool, deepest: int
) -> None:
    assert deepest_loop(ExitParams(0.5, 1, 2, mode, forced), 4, asked) == deepest


def test_pages_of_a_generated_position_by_mode() -> None:
    every = {"auto": 4, "skip": 4, "exact": 4, "lossless": 4}
    assert pages_per_token(4) == every | {"shared": 1}


def test_forced_depths_are_limits_of_the_tokens_to_come() -> None:
    work = [
        Work(0, 1, 1, 1, 9, min_loops=2, max_loops=3),
        Work(0, 1, known=5, prompt=3, last=9, forced=np.array([1, 2, 3])),
    ]
    low, high = depth_limits(work, 4)
    assert (low[0].tolist(), high[0].tolist()) == ([2] * 4, [3] * 4)
    assert low[1].tolist() == high[1].tolist() == [3, 1, 2, 3]


def test_the_last_token_is_read_out_where_tokens_or_the_length_end() -> None:
    # Three prompt tokens at 0..2: the first token is read out at 2, the fifth at 6.
    assert last_readout(prompt=3, max_tokens=5, longest=100) == 6
    # Eight positions: the token at 7 is read out at 6, and nothing after it.
    assert last_readout(prompt=3, max_tokens=50, longest=8) == 6
    assert last_readout(prompt=3, max_tokens=1, longest=100) == 2


def test_every_position_computed_again_stops_where_its_token_left() -> None:
    prompt, depths = 3, [4, 1, 2, 3, 1]
    known = prompt + len(depths)
    for start in range(known):
        for end in range(start + 1, known + 1):
            again = {
                p: depths[p - prompt + 1] for p in range(start, end) if prompt <= p < known - 1
            }
            offset, found = replayed(depths, prompt, start, end, known)
            assert {start + offset + i: depth for i, depth in enumerate(found)} == again


def test_in_shared_only_what_reads_nothing_deeper_is_computed_again_abreast() -> None:
    prompt, depths = 3, [4, 1, 1, 3, 1, 2, 1]
    # Positions 3 to 8 left at 1, 1, 3, 1, 2, 1; 9 is the head.
    assert [abreast(depths, prompt, start) for start in range(3, 10)] == [3, 2, 1, 2, 1, 2, 1]
