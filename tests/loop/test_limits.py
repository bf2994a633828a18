"""Limits and replays against counting by hand."""

from ouro_runtime.loop.limits import last_readout, replayed


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
