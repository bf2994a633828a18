"""What the executor does with the states of rows, by a block that only adds."""

from __future__ import annotations

import numpy as np
import torch

from ouro_runtime.loop.executor import StepExecutor
from ouro_runtime.loop.planner import StepPlan
from ouro_runtime.loop.rows import Left, Rows, Segments, Work

LOOPS = 4


class InPlace:
    """A runner whose block adds 1 to its input where it lies."""

    def prepare(self, rows: Rows, segments: Segments) -> None: ...

    def run_pass(self, hidden: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden.add_(1), torch.zeros(len(hidden))

    def embed(self, tokens: np.ndarray) -> torch.Tensor:
        return torch.zeros(len(tokens), 2)

    def read_out(self, hidden: torch.Tensor) -> torch.Tensor:
        raise AssertionError("nobody is sampled in the step")

    def sample(self, req: np.ndarray, logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        raise AssertionError("nobody is sampled in the step")

    draft = sample

    def stand_in(self, left: Left) -> None: ...


def test_what_is_sampled_after_the_step_is_the_state_that_was_read_out() -> None:
    """Though its row, the prompt's last, goes on to its deeper loops."""
    work = Work(0, 1, 1, prompt=1, last=9, forced=np.array([2]), single=True)
    result = StepExecutor(LOOPS).run(StepPlan([work], LOOPS), torch.zeros(1, 2), InPlace())
    assert result.pass_rows == [1] * LOOPS
    assert result.deferred[0].tolist() == [2, 2]
