"""Whatever is drafted on the way, a seed draws what it draws without drafts."""

from __future__ import annotations

import random

import pytest
import torch

from ouro_runtime.loop.draws import Draws

VOCAB = 6


def draw(generator: torch.Generator, text: list[int]) -> int:
    """Of a distribution that depends on the text, as vLLM draws: one exponential a token."""
    weights = torch.rand(VOCAB, generator=torch.Generator().manual_seed(hash(tuple(text))))
    return int((weights / torch.empty(VOCAB).exponential_(generator=generator)).argmax())


@pytest.mark.parametrize("right", [0.0, 0.5, 1.0])
def test_a_seed_draws_the_same(right: float) -> None:
    rng, outcomes = random.Random(1), set()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        wanted: list[int] = []
        for _ in range(30):
            wanted.append(draw(generator, wanted))
        text: list[int] = []
        drafted: list[int] = []
        draws = Draws()
        draws.generator = torch.Generator().manual_seed(seed)
        while len(text) < 30:
            event = rng.random()
            if event < 0.05:
                draws.drop()
                drafted = []
            elif event < 0.6 and len(drafted) < 4:
                draws.drafting()
                token = draw(draws.generator, text + drafted)
                drafted.append(token if rng.random() < right else (token + 1) % VOCAB)
            else:
                ahead = draws.rewind()
                assert (ahead is None) == (not drafted)
                text.append(draw(draws.generator, text))
                kept = bool(drafted) and drafted[0] == text[-1]
                outcomes |= {kept} if drafted else set()
                drafted = drafted[1:] if kept else []
                draws.confirm(ahead, kept)
        assert text == wanted, seed
    assert outcomes == ({True, False} if 0 < right < 1 else {bool(right)})


def test_who_draws_nothing_has_nothing_to_take_back() -> None:
    draws = Draws()
    draws.drafting()
    assert draws.rewind() is None
    draws.confirm(None, True)
    draws.drop()
