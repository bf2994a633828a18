"""The asynchronous scheduler's counts."""

import pytest

from ouro_runtime.config import ExitParams
from ouro_runtime.engine.cuda.scheduler import most_tokens


@pytest.mark.parametrize(
    ("depth", "most"),
    [
        (ExitParams(1.0, 1, 4, "skip"), 1),
        (ExitParams(0.5, 1, 4, "skip"), 4),
        (ExitParams(0.5, 2, 4, "skip"), 2),
        (ExitParams(0.5, 3, 4, "skip"), 2),
        (ExitParams(0.5, 4, 4, "skip"), 1),
        (ExitParams(1.0, 1, 2, "skip"), 2),
        (ExitParams(0.5, 1, 4, "exact"), 1),
        (ExitParams(1.0, 1, 4, "skip", (4, 2)), 2),
        (ExitParams(1.0, 1, 4, "skip", (1,)), 4),
    ],
)
def test_most_tokens_of_a_step(depth: ExitParams, most: int) -> None:
    assert most_tokens(depth, False, 4) == most
    assert most_tokens(depth, True, 4) == 1
