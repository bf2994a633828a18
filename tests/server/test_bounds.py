"""Exact binomial bounds, and the threshold that they let be chosen."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import pytest

from ouro_server.bounds import at_most, trials_needed, upper_bound
from ouro_server.calibrate.choose import Point, choose


@pytest.mark.parametrize(
    ("seen", "trials", "confidence", "bound"),
    [
        # The upper ends of R's binom.test at 95 %, two-sided.
        (1, 10, 0.975, 0.445016117),
        (5, 10, 0.975, 0.812914),
        (10, 100, 0.975, 0.1762226),
        # In closed form where nothing, or all, was seen.
        (0, 10, 0.95, 1 - 0.05**0.1),
        (0, 299, 0.95, 1 - 0.05 ** (1 / 299)),
        (0, 100_000, 0.99, 1 - 0.01**1e-5),
        (9, 10, 0.95, 0.95**0.1),
        (10, 10, 0.95, 1.0),
    ],
)
def test_the_bound_is_clopper_and_pearsons(
    seen: int, trials: int, confidence: float, bound: float
) -> None:
    assert upper_bound(seen, trials, confidence) == pytest.approx(bound, rel=1e-6)


@pytest.mark.parametrize(("seen", "trials"), [(0, 1), (3, 7), (20, 400), (399, 400), (400, 400)])
@pytest.mark.parametrize("rate", [0.001, 0.05, 0.5, 0.97])
def test_the_tail_is_the_binomials(seen: int, trials: int, rate: float) -> None:
    p = Fraction(rate)
    exact = sum(comb(trials, i) * p**i * (1 - p) ** (trials - i) for i in range(seen + 1))
    assert at_most(seen, trials, rate) == pytest.approx(float(exact), rel=1e-9, abs=1e-300)


def test_the_number_of_questions_needed_is_the_least_that_bounds_the_loss() -> None:
    assert trials_needed(0.01, 0.95) == 299
    assert trials_needed(0.1, 0.95) == 29
    for seen in (0, 1, 7):
        needed = trials_needed(0.02, 0.95, seen)
        assert upper_bound(seen, needed, 0.95) <= 0.02 < upper_bound(seen, needed - 1, 0.95)


def points(*lost: int, questions: int = 500) -> list[Point]:
    """Thresholds 1, 0.9, 0.8 .. that lost so many answers."""
    return [
        Point(round(1 - 0.1 * place, 1), questions, count, 10 * questions, 10 * questions, 1)
        for place, count in enumerate(lost)
    ]


def test_the_walk_ends_at_the_first_threshold_that_fails() -> None:
    """One that looks safe behind it is not taken, and what was seen there changes nothing."""
    choice = choose(points(0, 1, 30, 0), 0.01, 0.95)
    assert choice.chosen is not None and choice.chosen.threshold == 0.9
    assert choice.stopped is not None and choice.stopped.threshold == 0.8
    assert choice.bounds[1] <= 0.01 < choice.bounds[2]


def test_a_loss_under_the_promise_is_not_enough() -> None:
    """4 of 500 is 0.8 %, but 1 % would show so few in more than one calibration of 20."""
    choice = choose(points(0, 4), 0.01, 0.95)
    assert choice.chosen is not None and choice.chosen.threshold == 1


def test_all_thresholds_may_pass() -> None:
    choice = choose(points(0, 0, 1), 0.01, 0.95)
    assert choice.chosen is not None and choice.chosen.threshold == 0.8
    assert choice.stopped is None


def test_few_questions_promise_nothing_and_say_how_many_would() -> None:
    assert choose(points(0, 0, questions=298), 0.01, 0.95).chosen is None
    choice = choose(points(0, 0, questions=299), 0.01, 0.95)
    assert choice.chosen is not None and choice.chosen.threshold == 0.9
    assert choice.needed == 299
