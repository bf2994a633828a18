"""The asynchronous scheduler's counts."""

import pytest

from ouro_runtime.config import ExitParams
from ouro_runtime.engine.gpu_scheduler import most_tokens
from tests.engine.cases import CHECKPOINTS
from tests.gpu.fake_engine import FakeEngine, params


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


def test_counts_between_steps_and_at_the_end() -> None:
    engine = FakeEngine(CHECKPOINTS["t6-gqa"], budget=24, slots=8)
    for index, threshold in enumerate((0.1, 0.4, 0.8, 1.0)):
        engine.add(str(index), [7 + index] * 20, params(18, {"exit_threshold": threshold}))
    for _ in range(200):
        if not engine.scheduler.has_unfinished_requests():
            break
        engine.step()
        for request in engine.scheduler.running:
            if request.is_prefill_chunk:
                continue
            most = request.num_output_placeholders
            flight = engine.scheduler._flight[request.request_id]
            assert 0 <= most <= sum(flight)
            assert request.num_computed_tokens == request.num_tokens - 1 + most
            assert request.num_computed_tokens < request.num_prompt_tokens + request.max_tokens
    engine.run()
    engine.assert_idle()
