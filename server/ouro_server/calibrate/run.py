"""Has an engine answer the questions, and says which answers were lost."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ouro_runtime.config import GATE
from ouro_server.calibrate.choose import Point
from ouro_server.calibrate.errors import CalibrationError
from ouro_server.calibrate.plan import Plan, Series
from ouro_server.calibrate.questions import Question
from ouro_server.calibrate.state import State


@dataclass(frozen=True)
class Answer:
    """A greedy answer: token ids, the depth of each, and the text of those that are text."""

    tokens: list[int]
    depths: list[int]
    text: str


class Engine(Protocol):
    """What a calibration needs of an engine."""

    def prompts(self, questions: Sequence[Question]) -> list[list[int]]:
        """Token ids of each question; CalibrationError for one too long to answer."""

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        mode: str,
        threshold: float,
        max_tokens: int,
        rule: str = GATE,
    ) -> list[Answer]:
        """Greedy answers."""

    def choices(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> list[list[bool]]:
        """Whether each answer token is the full-depth choice given the tokens before it: one pass
        of every loop over prompt and answer together."""


@dataclass
class Run:
    """One calibration. `start` makes the engine, when the first answer is needed; `tell` hears what
    is being answered and how many questions were."""

    plan: Plan
    questions: Sequence[Question]
    state: State
    start: Callable[[], Engine]
    tell: Callable[[str, int], None]
    _engine: Engine | None = None

    @property
    def known(self) -> bool:
        """Whether what is right is known of every question."""
        return all(question.expected for question in self.questions)

    def points(self) -> dict[str, list[Point]]:
        """By name of a series, what was seen at each threshold from full depth on."""
        full = [self._full(name, chunk) for name, chunk in self._chunks("full")]
        seen = {}
        for series in self.plan.series:
            points = [self._point(series.off, full)]
            for q in self.plan.thresholds[series.rule]:
                chunks = self._chunks(f"{series.name} {q:g}")
                found = [
                    self._adaptive(name, series, q, chunk, of)
                    for (name, chunk), of in zip(chunks, full, strict=True)
                ]
                points.append(self._point(q, found))
            seen[series.name] = points
        return seen

    def _chunks(self, what: str) -> Iterator[tuple[str, Sequence[Question]]]:
        step = self.plan.chunk
        for first in range(0, len(self.questions), step):
            chunk = self.questions[first : first + step]
            yield f"{what} {first}", chunk
            self.tell(what, len(chunk))

    def _full(self, name: str, chunk: Sequence[Question]) -> dict[str, Any]:
        if name not in self.state:
            answers = self._answer(chunk, Series(GATE, "skip"), 1.0)
            found = _counts(chunk, answers, [0] * len(chunk), sum(len(a.tokens) for a in answers))
            self.state.add(name, found | {"answers": [a.tokens for a in answers]})
        return self.state[name]

    def _adaptive(
        self, name: str, series: Series, q: float, chunk: Sequence[Question], full: dict[str, Any]
    ) -> dict[str, Any]:
        if name not in self.state:
            answers = self._answer(chunk, series, q)
            agreed = self._agreed(chunk, answers, full["answers"])
            if self.plan.check == "agree":
                lost = [int(n < len(a.tokens)) for n, a in zip(agreed, answers, strict=True)]
            else:
                lost = [
                    int(was and not question.right(answer.text))
                    for was, question, answer in zip(full["right"], chunk, answers, strict=True)
                ]
            self.state.add(name, _counts(chunk, answers, lost, sum(agreed)))
        return self.state[name]

    def _answer(self, chunk: Sequence[Question], series: Series, q: float) -> list[Answer]:
        prompts = self.engine.prompts(chunk)
        return self.engine.answer(prompts, series.mode, q, self.plan.max_tokens, series.rule)

    def _agreed(
        self, chunk: Sequence[Question], answers: Sequence[Answer], full: Sequence[list[int]]
    ) -> list[int]:
        """How many tokens of each answer are the full-depth choice. Those of an answer that is the
        full-depth answer are; the others are asked of a pass over them."""
        agreed = [len(answer.tokens) for answer in answers]
        other = [i for i, answer in enumerate(answers) if answer.tokens != full[i]]
        if other:
            prompts = self.engine.prompts([chunk[i] for i in other])
            choices = self.engine.choices(prompts, [answers[i].tokens for i in other])
            for i, choice in zip(other, choices, strict=True):
                agreed[i] = sum(choice)
        return agreed

    def _point(self, threshold: float, chunks: Sequence[dict[str, Any]]) -> Point:
        return Point(
            threshold,
            len(self.questions),
            sum(sum(chunk["lost"]) for chunk in chunks),
            sum(chunk["tokens"] for chunk in chunks),
            sum(chunk["agreed"] for chunk in chunks),
            sum(chunk["depths"] for chunk in chunks),
            sum(sum(chunk["right"]) for chunk in chunks) if self.known else None,
        )

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            self._engine = self.start()
        return self._engine


def _counts(
    chunk: Sequence[Question], answers: Sequence[Answer], lost: list[int], agreed: int
) -> dict[str, Any]:
    """What the state keeps of a chunk: by question, whether its answer is lost and whether it is
    right; sums over all tokens."""
    right = [int(q.right(a.text)) for q, a in zip(chunk, answers, strict=True)]
    return {
        "lost": lost,
        "tokens": sum(len(answer.tokens) for answer in answers),
        "agreed": agreed,
        "depths": sum(sum(answer.depths) for answer in answers),
        "right": right,
    }


def check_expected(plan: Plan, questions: Sequence[Question]) -> None:
    """CalibrationError, naming the line, unless every question has what `plan` checks against."""
    missing = next((q.line for q in questions if not q.expected), None)
    if plan.check == "expected" and missing is not None:
        raise CalibrationError(
            f"line {missing}: no expected, which --check expected compares answers with"
        )
