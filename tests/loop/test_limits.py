"""Limits and replays against counting by hand."""

from typing import Any

import pytest

from ouro_runtime.config import ExitParams
from ouro_runtime.loop.limits import deepest_loop, last_readout, replayed


@pytest.mark.parametrize(
    ("controls", "prompt_logprobs", "deepest"),
    [
        ({"exit_mode": "skip"}, False, 2),
        ({"exit_mode": "exact"}, False, 2),
        ({"exit_mode": "shared"}, False, 4),  # what is generated reads loop 4 of the prompt
        ({"exit_mode": "lossless"}, False, 4),  # the bound is its drafts'
        ({"exit_mode": "skip"}, True, 4),  # which are loop 4's
        ({"exit_mode": "skip", "forced_depths": (1, 3, 1)}, False, 3),
        ({"exit_mode": "exact", "forced_depths": (1,)}, False, 1),
    ],
    ids=str,
)
def test_a_request_goes_as_deep_as_it_can_read(
    controls: dict[str, Any], prompt_logprobs: bool, deepest: int
) -> None:
    params = ExitParams(exit_threshold=0.5, min_loops=1, max_loops=2, **controls)
    assert deepest_loop(params, 4, prompt_logprobs) == deepest


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
