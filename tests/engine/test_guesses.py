"""How what each loop would have said waits, is packed and unpacked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams

from ouro_runtime.config import ExitParams, LoopConfig
from ouro_runtime.engine.cpu.step import CPUStep
from ouro_runtime.engine.guesses import Guesses, likeliest, unpack
from ouro_runtime.engine.requests import LoopRequest
from ouro_runtime.loop.executor import StepExecutor
from ouro_runtime.loop.planner import StepPlan
from ouro_runtime.loop.rows import Left, Rows, Segments

NOTES = np.arange(16, dtype=np.int16).reshape(2, 8)


def hear(guesses: Guesses, position: int, loop: int, *ids: int) -> None:
    guesses.hear(position, loop, np.array(ids), np.array([-0.5 * i for i in ids], np.float32))


def test_what_was_heard_comes_out_behind_the_notes() -> None:
    guesses = Guesses(most=2, loops=4)
    hear(guesses, 7, 0, 5, 6, 9)
    hear(guesses, 7, 1, 100_000, 6)
    hear(guesses, 8, 0, 1)
    packed = guesses.take(7, NOTES)
    assert packed.dtype == np.int32
    assert (packed[:, :8] == NOTES).all()
    expected = [
        [[(5, -2.5), (6, -3.0)], [(100_000, -50_000.0), (6, -3.0)]],
        [[(1, -0.5)]],
    ]
    assert unpack(packed) == expected
    assert unpack(packed[:1]) == expected[:1]


def test_a_position_that_is_started_again_forgets_what_was_heard() -> None:
    guesses = Guesses(most=1, loops=4)
    for loop in range(3):
        hear(guesses, 7, loop, 9)
    hear(guesses, 7, 0, 3)
    assert unpack(guesses.take(7, NOTES[:1])) == [[[(3, -1.5)]]]


def test_notes_of_others_hold_nothing() -> None:
    assert unpack(NOTES) == []


def test_the_likeliest_are_in_order_and_no_more_than_there_are() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]], dtype=torch.bfloat16)
    ids, logprobs = likeliest(logits, 2)
    assert ids.tolist() == [[1, 2], [0, 2]]
    assert np.allclose(logprobs, [[-0.1698, -2.1698], [-0.4076, -1.4076]], atol=1e-3)
    assert likeliest(logits, 20)[0].shape == (2, 3)


VOCAB = 61


def said(position: int, loop: int) -> int:
    """What the model below would say at a position after a loop, from 1 on."""
    return (7 * position + 3 * loop) % VOCAB


class Model:
    """A state is (position, loops run); a gate that always halts with probability 0.3."""

    def model(self, hidden: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ran = torch.stack([positions.float(), hidden[:, 1] + 1], dim=1)
        return ran, torch.full((len(hidden),), 0.3)

    def read_out(self, states: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(states), VOCAB)
        for row, (position, loop) in enumerate(states.long().tolist()):
            logits[row, said(position, loop)] = 5.0
        return logits


class Step(CPUStep):
    """A step without attention, sampler and stand-ins."""

    def prepare(self, rows: Rows, segments: Segments) -> None:
        self._cells = SimpleNamespace(seconds=0.0)  # type: ignore[assignment]

    def embed(self, tokens: np.ndarray) -> torch.Tensor:
        return torch.zeros(len(tokens), 2)

    def sample(self, req: np.ndarray, logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        return logits.argmax(-1).numpy(), np.zeros(len(req), bool)

    draft = sample

    def stand_in(self, left: Left) -> None:
        pass


CONTROLS: list[dict[str, Any]] = [
    {},
    {"exit_threshold": 0.4},
    {"exit_threshold": 0.6, "exit_mode": "exact"},
    {"forced_depths": [1, 3, 1, 1, 4, 2]},
    {"exit_mode": "lossless", "exit_threshold": 0.2},
    {"exit_mode": "lossless", "forced_depths": [2, 1, 3]},
    {"max_loops": 2},
]


@pytest.mark.parametrize("prompts", [[3] * 7, [1, 9, 2, 5, 30, 4, 1]], ids=["alike", "ragged"])
def test_every_token_of_a_mixed_batch_has_the_guesses_of_its_own_position_and_loops(
    prompts: list[int],
) -> None:
    """Over many steps, with rows that are carried; the last request does not ask."""
    loops, tokens = 4, 25
    config = LoopConfig(loops, ExitParams(1.0, 1, loops, "skip"))
    asking = [{**fields, "return_loops": 2} for fields in CONTROLS[:-1]] + CONTROLS[-1:]
    requests = [
        LoopRequest.of(
            SamplingParams(max_tokens=tokens, extra_args=extra),
            prompt,
            config,
        )
        for extra, prompt in zip(asking, prompts, strict=True)
    ]
    executor = StepExecutor(loops)
    for request in requests:
        request.slot = requests.index(request)
        executor.rule.open(request.slot)
    start, known = [0] * len(requests), list(prompts)
    found: list[list[Any]] = [[] for _ in requests]
    dtypes = {np.dtype(np.int32): 0, np.dtype(np.int16): 0}
    for _ in range(tokens):
        work = [
            request.work(start[i], known[i] - start[i], known[i], 1000, drafts=True)
            for i, request in enumerate(requests)
        ]
        plan = StepPlan(work, loops)
        nobody = np.zeros(len(requests), np.int64)
        parts: Any = (None, None, None, None)
        step = Step(Model(), requests, *parts, adapters=None, adapter_ids=nobody)
        step.run(executor, plan, torch.zeros(plan.scheduled, 2), keep_hidden=False)
        for i, notes in enumerate(step.notes):
            dtypes[notes.dtype] += 1
            found[i] += unpack(notes)
            known[i] += len(notes)
            start[i] = known[i] - 1
    assert dtypes[np.dtype(np.int16)] == tokens, "who does not ask has notes like anybody"
    assert found[-1] == []
    for request, prompt, each, fields in zip(
        requests[:-1], prompts, found, CONTROLS[:-1], strict=False
    ):
        lossless = fields.get("exit_mode") == "lossless"
        assert len(each) == len(request.depths) >= tokens - 1
        for place, token in enumerate(each):
            depth = loops if lossless else request.depths[place]
            expected = [said(prompt - 1 + place, loop) for loop in range(1, depth + 1)]
            assert [loop[0][0] for loop in token] == expected, (fields, place)
            assert all(len(loop) == 2 for loop in token)
