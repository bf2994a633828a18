"""The simulator says what the planner does with thousands of requests."""

import numpy as np
import pytest

from ouro_runtime.loop.simulate import Trace, random_depths, simulate


def test_gain_is_near_the_bound_when_slots_are_full() -> None:
    rng = np.random.default_rng(0)
    traces = [Trace(1, random_depths(rng, 64, 2.5, 4)) for _ in range(512)]
    out = simulate(traces, slots=512, loops=4)
    assert sum(out.tokens) == 512 * 64
    gain = 4 * 64 / len(out.rows)
    bound = 4 * 512 * 64 / out.cells
    assert 0.85 * bound < gain <= bound


def test_full_depth_takes_a_pass_per_loop() -> None:
    traces = [Trace(3, np.full(5, 4)) for _ in range(2)]
    out = simulate(traces, slots=2, loops=4)
    assert len(out.rows) == 20 and out.tokens == [2] * 5
    assert out.rows[:4] == [6] * 4 and out.rows[4:] == [2] * 16


@pytest.mark.parametrize("mean", [1.0, 1.7, 3.2, 4.0])
def test_random_depths_have_the_mean_asked_for(mean: float) -> None:
    depths = random_depths(np.random.default_rng(1), 20000, mean, 4)
    assert depths.min() >= 1 and depths.max() <= 4
    assert abs(depths.mean() - mean) < 0.02


@pytest.mark.parametrize(("acceptance", "depth", "passes"), [(1.0, 2, 2), (0.0, 2, 4), (1.0, 4, 4)])
def test_a_lossless_token_waits_for_the_loop_at_which_it_is_first_known(
    acceptance: float, depth: int, passes: int
) -> None:
    tokens = 32
    wrong = np.full(tokens, acceptance == 0)
    out = simulate([Trace(3, np.full(tokens, depth), wrong=wrong)], slots=1, loops=4)
    assert sum(out.tokens) == tokens
    # The prompt's last position runs every loop, and the last token is not drafted.
    assert abs(len(out.rows) - passes * tokens) <= 4
    assert abs(out.cells - passes * tokens) <= 4


def test_lossless_gains_by_the_share_of_right_drafts() -> None:
    rng = np.random.default_rng(0)
    gains = []
    for acceptance in (0.5, 0.9, 1.0):
        traces = [
            Trace(1, random_depths(rng, 64, 1.6, 4), wrong=rng.random(64) >= acceptance)
            for _ in range(64)
        ]
        out = simulate(traces, slots=8, loops=4)
        assert sum(out.tokens) == 64 * 64
        gains.append(4 * 64 * 64 / 8 / len(out.rows))
    assert 1 < gains[0] < gains[1] < gains[2] <= 4 / 1.5
