"""How what each loop would have said waits, is packed and unpacked."""

from __future__ import annotations

import numpy as np
import torch

from ouro_runtime.engine.guesses import Guesses, likeliest, unpack

NOTES = np.arange(16, dtype=np.int16).reshape(2, 8)


def hear(guesses: Guesses, position: int, loop: int, *ids: int) -> None:
    guesses.hear(position, loop, np.array(ids), np.array([-0.5 * i for i in ids], np.float32))


def test_what_was_heard_comes_out_behind_the_notes() -> None:
    guesses = Guesses(most=2, loops=4)
    hear(guesses, 7, 0, 5, 6, 9)
    hear(guesses, 7, 1, 100_000, 6)
    hear(guesses, 8, 0, 1)
    packed = guesses.take(7, NOTES)
    assert packed.dtype == np.int32
    assert (packed[:, :8] == NOTES).all()
    expected = [
        [[(5, -2.5), (6, -3.0)], [(100_000, -50_000.0), (6, -3.0)]],
        [[(1, -0.5)]],
    ]
    assert unpack(packed) == expected
    assert unpack(packed[:1]) == expected[:1]


def test_a_position_that_is_started_again_forgets_what_was_heard() -> None:
    guesses = Guesses(most=1, loops=4)
    for loop in range(3):
        hear(guesses, 7, loop, 9)
    hear(guesses, 7, 0, 3)
    assert unpack(guesses.take(7, NOTES[:1])) == [[[(3, -1.5)]]]


def test_notes_of_others_hold_nothing() -> None:
    assert unpack(NOTES) == []


def test_the_likeliest_are_in_order_and_no_more_than_there_are() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]], dtype=torch.bfloat16)
    ids, logprobs = likeliest(logits, 2)
    assert ids.tolist() == [[1, 2], [0, 2]]
    assert np.allclose(logprobs, [[-0.1698, -2.1698], [-0.4076, -1.4076]], atol=1e-3)
    assert likeliest(logits, 20)[0].shape == (2, 3)
