"""The argmax of the greedy path, and the largest with their ties settled, against torch's."""

import numpy as np
import pytest
import torch

from ouro_runtime.loop.greedy import argmax, largest

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INF = float("inf")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [-100.0, 0.0, 100.0])
def test_as_torch_says(dtype: torch.dtype, shift: float) -> None:
    """bfloat16 has many ties here: the first of them is taken."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(5, 3001, generator=generator) + shift).to(dtype)
    assert np.array_equal(argmax(logits), logits.float().argmax(-1).numpy())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("row", "place"),
    [
        ([-1.0, -0.0, 0.0], 1),
        ([-1.0, 0.0, -0.0], 1),
        ([-INF, -INF], 0),
        ([-INF, -3.0], 1),
        ([1.0, INF, INF], 1),
        ([-2.0, -1.0, -1.0], 1),
        ([7.0], 0),
    ],
)
def test_edges(dtype: torch.dtype, row: list[float], place: int) -> None:
    assert argmax(torch.tensor([row], dtype=dtype)).tolist() == [place]


def test_no_rows() -> None:
    assert argmax(torch.empty(0, 9)).shape == (0,)


@pytest.mark.parametrize("count", [0, 1, 3, 20, 40])
def test_the_largest_do_not_depend_on_how_many_are_asked_for(count: int) -> None:
    """Few different values, and more of them masked than not: all is ties."""
    generator = torch.Generator().manual_seed(count)
    scores = torch.randint(0, 4, (6, 40), generator=generator).float()
    scores[3:, torch.randperm(40, generator=generator)[:35]] = -INF
    values, places = largest(scores, count)
    every = scores.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(values, every.values[:, :count])
    assert torch.equal(places, every.indices[:, :count])


def test_a_row_with_nan_leaves_the_others_alone() -> None:
    scores = torch.tensor([[1.0, float("nan"), 1.0], [1.0, 2.0, 2.0]])
    assert largest(scores, 2)[1][1].tolist() == [1, 2]
