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
