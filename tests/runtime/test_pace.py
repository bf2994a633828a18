"""The pace of one request's tokens."""

from __future__ import annotations

import pytest

from ouro_runtime.pace import Pace


def test_the_first_delivery_starts_the_clock_and_is_not_counted() -> None:
    pace = Pace()
    assert pace.deliver(10.0, 1) is None
    assert pace.seconds_per_token is None
    assert (pace.tokens, pace.seconds) == (0, 0.0)


def test_the_mean_is_over_tokens_not_over_deliveries() -> None:
    pace = Pace()
    pace.deliver(10.0, 2)
    assert pace.deliver(10.5, 1) == pytest.approx(0.5)
    assert pace.deliver(11.5, 4) == pytest.approx(1.0)
    assert pace.seconds_per_token == pytest.approx(1.5 / 5)
