"""Calibrations without an engine, and the questions of those with one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ouro_runtime.config import DELTA, GATE, RULES
from ouro_runtime.training.evaluate import suite
from ouro_server.calibrate.questions import Question
from ouro_server.calibrate.run import Answer

LOOPS = 4


def write_questions(path: Path, each: int, limit: int | None = None) -> None:
    """Held-out problems of ouro-mini as chats, `each` of every family and difficulty."""
    lines = [
        json.dumps({"messages": [{"role": "user", "content": p.question}], "expected": p.answer})
        for problems in suite(each).values()
        for p in problems
    ]
    path.write_text("\n".join(lines[:limit]) + "\n")


class FakeEngine:
    """Question n, whose prompt is its number as text, is answered n, n + 1, 2 at full depth; below
    the threshold `fails[n]` the second token is another, and right only if it is expected.

    `calls` counts batches; the one after `dies_after` of them raises.
    """

    def __init__(self, fails: Mapping[int, float], dies_after: int | None = None) -> None:
        self.fails = fails
        self.dies_after = dies_after
        self.calls = 0

    def prompts(self, questions: Sequence[Question]) -> list[list[int]]:
        return [[int(question.prompt or 0)] for question in questions]

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        mode: str,
        threshold: float,
        max_tokens: int,
        rule: str = GATE,
    ) -> list[Answer]:
        if self.calls == self.dies_after:
            raise KeyboardInterrupt
        self.calls += 1
        most, off = RULES[rule]
        full = threshold == off
        # As if a change of the state were what is left to be sure.
        sure = most - threshold if rule == DELTA else threshold
        found = []
        for (n,) in prompts:
            tokens = [n, n + 1 if full or sure >= self.fails.get(n, 0) else -1, 2]
            depths = [LOOPS] * 3 if full else [1, 2, 3]
            found.append(Answer(tokens, depths, str(tokens[1])))
        return found

    def choices(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> list[list[bool]]:
        return [
            [token == choice for token, choice in zip(answer, [n, n + 1, 2], strict=True)]
            for (n,), answer in zip(prompts, answers, strict=True)
        ]
