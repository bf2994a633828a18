"""Each request leaves by its own rule, whatever the rules of the others in its batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ouro_runtime.loop.executor import StepExecutor
from ouro_runtime.loop.planner import StepPlan
from ouro_runtime.loop.rows import Left, Rows, Segments, Work

LOOPS, REQUESTS, HIDDEN, VOCAB = 5, 60, 6, 9
RULES = ("threshold", "margin", "delta")
OFF = {"threshold": 1.0, "margin": 1.0, "delta": 0.0}


class Told:
    """A block that leaves told states, in place, and a gate that halts with told chances."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.states = torch.from_numpy(rng.normal(size=(REQUESTS, LOOPS, HIDDEN))).float()
        self.halts = torch.from_numpy(rng.random((REQUESTS, LOOPS)) / 2).float()
        self.head = 2 * torch.from_numpy(rng.normal(size=(HIDDEN, VOCAB))).float()
        self.read: list[tuple[float, ...]] = []

    def prepare(self, rows: Rows, segments: Segments) -> None: ...

    def run_pass(self, hidden: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden.copy_(self.states[rows.req, rows.loop]), self.halts[rows.req, rows.loop]

    def embed(self, tokens: np.ndarray) -> torch.Tensor:
        return torch.zeros(len(tokens), HIDDEN)

    def read_out(self, hidden: torch.Tensor) -> torch.Tensor:
        self.read += map(tuple, hidden.tolist())
        return hidden @ self.head

    def sample(self, req: np.ndarray, logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        raise AssertionError("every request is sampled after the step")

    draft = sample

    def stand_in(self, left: Left) -> None: ...

    def reading(self, rule: str, request: int, depth: int) -> float:
        """What a rule reads after `depth` loops, worked out on its own, in float64."""
        states = self.states[request].double()
        if rule == "threshold":
            return 1 - float((1 - self.halts[request, :depth].double()).prod())
        if rule == "margin":
            first, second = (states[depth - 1] @ self.head.double()).softmax(-1).topk(2).values
            return float(first - second)
        moved = states[depth - 1] - states[depth - 2]
        return float(moved.norm() / states[depth - 1].norm()) if depth > 1 else float("inf")

    def open(self, rule: str, request: int, controls: dict[str, Any]) -> list[int]:
        """The loops after which a rule has to decide, up to the one at which the token leaves."""
        low, high = controls["min_loops"], controls["max_loops"]
        for depth in range(low, high):
            reading, threshold = self.reading(rule, request, depth), controls[rule]
            fires = reading <= threshold if rule == "delta" else reading >= threshold
            if fires and threshold != OFF[rule]:
                return list(range(low, depth + 1))
        return list(range(low, high + 1))


@pytest.mark.parametrize("seed", range(6))
def test_requests_of_all_rules_share_a_batch_and_only_margins_are_read_out(seed: int) -> None:
    rng = np.random.default_rng(seed)
    told = Told(rng)
    work, wanted, to_read = [], [], set()
    for request in range(REQUESTS):
        rule = RULES[request % 3]
        low, high = sorted(rng.integers(1, LOOPS + 1, 2).tolist())
        level = told.reading(rule, request, int(rng.integers(2, LOOPS)))
        value = OFF[rule] if rng.random() < 0.2 else level + 1e-4 * (1 if rule == "delta" else -1)
        controls: dict[str, Any] = {rule: value, "min_loops": low, "max_loops": high}
        if rng.random() < 0.1:
            forced = int(rng.integers(1, LOOPS + 1))
            # As a request says it: where depths are forced no rule is on.
            controls = {"forced": np.array([forced]), "min_loops": 1, "max_loops": LOOPS}
            wanted.append(forced)
        else:
            decided = told.open(rule, request, controls)
            wanted.append(decided[-1])
            if rule == "margin" and value < 1:
                rows = told.states[request, [d - 1 for d in decided if d < high]]
                to_read |= set(map(tuple, rows.tolist()))
        exact = bool(rng.random() < 0.3)
        prompt = int(rng.integers(1, 4))
        work.append(Work(0, prompt, prompt, prompt, 9, exact=exact, single=True, **controls))
    embedded = torch.zeros(sum(w.count for w in work), HIDDEN)
    result = StepExecutor(LOOPS).run(StepPlan(work, LOOPS), embedded, told)
    depths = {
        int(request): int(depth)
        for out in result.readouts
        for request, depth in zip(out.req, out.depth, strict=True)
    }
    assert [depths[request] for request in range(REQUESTS)] == wanted
    assert len(told.read) == len(to_read) > 5
    assert set(told.read) == to_read
    assert len(set(wanted)) == LOOPS


def test_a_batch_of_gates_alone_reads_out_nothing() -> None:
    told = Told(np.random.default_rng(0))
    work = [Work(0, 1, 1, 1, 9, 0.3, max_loops=LOOPS, single=True) for _ in range(4)]
    StepExecutor(LOOPS).run(StepPlan(work, LOOPS), torch.zeros(4, HIDDEN), told)
    assert not told.read
