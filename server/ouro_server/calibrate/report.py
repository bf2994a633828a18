"""The report of a calibration, in markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ouro_runtime.config import GATE
from ouro_server.bounds import trials_needed
from ouro_server.calibrate.choose import Point
from ouro_server.calibrate.plan import Plan
from ouro_server.calibrate.presets import Promise

LOST = {
    "agree": "it is not that of full depth, token for token",
    "expected": "it is wrong where that of full depth is right",
}


@dataclass(frozen=True)
class Facts:
    """What a report is about: names as the user gave them, and how many questions differ."""

    model: str
    questions_file: str
    questions: int
    different: int
    loops: int


def verdict(promise: Promise, questions: int) -> str:
    """What came of a promise, as a sentence or two."""
    choice = promise.choice
    point, stopped = choice.chosen, choice.stopped
    if point is None:
        return (
            f"{promise.name}: no promise. {questions} questions are too few: even with no answer "
            f"lost, a loss of at most {choice.loss:g} with confidence {choice.confidence:g} needs "
            f"{choice.needed}."
        )
    rule = "" if promise.series.rule == GATE else f"exit_rule {promise.series.rule}, "
    text = (
        f"{promise.name}: {rule}exit_threshold {point.threshold:g}, mean depth "
        f"{point.mean_depth:.2f}, "
        f"{point.lost} of {questions} lost. {promise.text}"
    )
    if point.threshold == promise.series.off:
        text += " Only full depth can promise it, which saves nothing."
    if stopped is not None and stopped.loss < choice.loss:
        more = trials_needed(choice.loss, choice.confidence, stopped.lost)
        text += (
            f" Threshold {stopped.threshold:g} lost {stopped.lost}, which {questions} questions "
            f"cannot bound by {choice.loss:g}; {more} with no more lost could."
        )
    return text


def page(
    facts: Facts,
    plan: Plan,
    points: Mapping[str, Sequence[Point]],
    promises: Sequence[Promise],
) -> str:
    """The whole page."""
    parts = [f"# Calibration of {facts.model}", _introduction(facts, plan), "## Promises"]
    parts.append("\n".join(f"- {verdict(promise, facts.questions)}" for promise in promises))
    parts.append("![Loss with its bound against mean depth](report.svg)")
    for name, seen in points.items():
        parts.append(f"## Every threshold, `{name}`")
        parts.append(_table(plan, seen, [p for p in promises if p.series.name == name]))
    if "exact" in plan.modes:
        parts.append("In `exact` the loops after the exit run too: depth is not what it costs.")
    return "\n\n".join([*parts, _how(plan)]) + "\n"


def _introduction(facts: Facts, plan: Plan) -> str:
    text = (
        f"{facts.questions} questions of {facts.questions_file}, answered greedily with up to "
        f"{plan.max_tokens} tokens at full depth ({facts.loops} loops) and at every threshold. An "
        f"answer is lost if {LOST[plan.check]}."
    )
    if facts.different < facts.questions:
        text += (
            f" **Only {facts.different} of them are different questions.** Bounds count "
            "all: they hold if what will be asked repeats itself as much."
        )
    return text


def _table(plan: Plan, points: Sequence[Point], promises: Sequence[Promise]) -> str:
    known = points[0].right is not None
    head = ["threshold", "mean depth", "lost", "loss, %", "bound, %", "tokens that agree, %"]
    head += (["right, %"] if known else []) + [promise.name for promise in promises]
    rows = [head, ["---"] * len(head)]
    for place, point in enumerate(points):
        row = [
            f"{point.threshold:g}",
            f"{point.mean_depth:.2f}",
            str(point.lost),
            f"{100 * point.loss:.2f}",
            f"{100 * promises[0].choice.bounds[place]:.2f}",
            f"{100 * point.agreed / max(1, point.tokens):.2f}",
        ]
        if point.right is not None:
            row.append(f"{100 * point.right / point.questions:.1f}")
        rows.append(row + [_passed(promise, points, place) for promise in promises])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _passed(promise: Promise, points: Sequence[Point], place: int) -> str:
    last = promise.choice.passed - 1
    return "" if place > last else "**chosen**" if place == last else "passed"


def _how(plan: Plan) -> str:
    bound = f"{100 * plan.each:.4g} %"
    return (
        "## What is promised, and how\n\n"
        f"With {100 * plan.confidence:g} % confidence all promises hold, of questions drawn like "
        "these, one independently of the other, answered greedily by this checkpoint on an engine "
        "set up like this one. Sampled answers, other questions and other checkpoints are not "
        f"covered. A bound is the one-sided Clopper-Pearson bound at {bound} (promises share the "
        "confidence). Thresholds are tested from full depth on, and the first whose bound is over "
        "the promised loss ends it (fixed-sequence testing, as in [Learn then "
        "Test](https://arxiv.org/abs/2110.01052)): a cheaper one that looks good after that is "
        "luck. "
        "Tokens that agree are the full-depth choice given the tokens before them, as one pass of "
        "every loop over question and answer says; they have no bound, since tokens of an answer "
        "are not independent."
    )
