"""The argmax of the greedy path against torch's."""

import numpy as np
import pytest
import torch

from ouro_runtime.loop.greedy import argmax

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
