"""Answers against an independent solver, and the split."""

import random
import re

import pytest

from ouro_runtime.training.data import ChatSource, Curriculum
from ouro_runtime.training.evaluate import suite
from ouro_runtime.training.recipe import Recipe, corpus
from ouro_runtime.training.tasks import FAMILIES, Chat, Problem, is_held_out
from ouro_runtime.training.tokenizer import train_tokenizer


def _close(expr: str) -> int:
    """One past the parenthesis that closes the first."""
    level = 0
    for i, c in enumerate(expr):
        level += (c == "(") - (c == ")")
        if level == 0:
            return i + 1
    raise ValueError(expr)


def solve(problem: Problem) -> str:
    """The answer, from the question's text alone."""
    q = problem.question
    if problem.family == "sum":
        (expr,) = re.findall(r"\d+ ?[+-] ?\d+", q)
        return str(eval(expr))
    if problem.family == "mod":
        (expr, m) = re.findall(r"([0-9(][0-9()+*-]*) mod (\d+)", q)[0]
        inner = [expr[expr.count("(") - i - 1 :] for i in range(expr.count("("))]
        values = [str(eval(e[: _close(e)]) % int(m)) for e in inner]
        told = f" via {', '.join(values)}" if values else ""
        return f"It is {eval(expr) % int(m)}{told}."
    if problem.family == "chain":
        links = dict(re.findall(r"(\w+) to (\w+)", q))
        at = re.findall(r"does (\w+)", q)[0]
        path = []
        while links[at] != at:
            at = links[at]
            path.append(at)
        return f"To {path[-1]} via {path[0]}."
    row = re.findall(r"\b[A-D]\b", q)
    for i, j in re.findall(r"(\d)-(\d)", q):
        i, j = int(i) - 1, int(j) - 1
        row[i], row[j] = row[j], row[i]
    return f"Now {' '.join(row)}."


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_right(name: str) -> None:
    rng = random.Random(3)
    for level in range(FAMILIES[name].top + 1):
        for _ in range(100):
            problem = FAMILIES[name].draw(rng, level)
            assert solve(problem) == problem.answer, problem
            assert problem.verify(problem.answer) and problem.verify(f" {problem.answer}\n")
            assert not problem.verify(problem.answer + " 1") and not problem.verify("")


@pytest.mark.parametrize("name", FAMILIES)
def test_problems_repeat_from_a_seed(name: str) -> None:
    family = FAMILIES[name]
    one = [family.sample(random.Random(5), 2, "train") for _ in range(3)]
    assert one == [family.sample(random.Random(5), 2, "train") for _ in range(3)]


def test_difficulty_lengthens_the_problem() -> None:
    rng = random.Random(0)
    for family in FAMILIES.values():
        lengths = [
            sum(len(p.question + p.answer) for p in (family.draw(rng, level) for _ in range(50)))
            for level in range(family.top + 1)
        ]
        # Chains are told among ten links whatever their length.
        assert lengths == sorted(lengths) or family.name == "chain"


def test_train_and_test_are_disjoint() -> None:
    """What training draws is never held out, and what is measured always is."""
    drawn: dict[str, set[str]] = {name: set() for name in FAMILIES}
    rng = random.Random(1)
    for name, family in FAMILIES.items():
        for level in range(family.top + 1):
            drawn[name] |= {family.sample(rng, level, "train").key for _ in range(1500)}
    tested = {p.key for problems in suite(200).values() for p in problems}
    assert not any(is_held_out(key) for keys in drawn.values() for key in keys)
    assert all(is_held_out(key) for key in tested)
    assert not tested & set.union(*drawn.values())


def test_training_batches_hold_no_held_out_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only the families: the path training takes to them asks for the training split."""
    tok = train_tokenizer(corpus(Recipe(corpus_problems=200)), 1024)
    source = ChatSource(tok, Curriculum(levels={n: f.top for n, f in FAMILIES.items()}))
    seen: list[Problem] = []
    for family in FAMILIES.values():
        original = family.sample

        def spy(*args: object, original: object = original, **kwargs: object) -> Problem:
            seen.append(original(*args, **kwargs))  # type: ignore[operator]
            return seen[-1]

        monkeypatch.setattr(family, "sample", spy)
    source.batch(random.Random(2), 16, 128)
    assert len(seen) > 30 and not any(is_held_out(p.key) for p in seen)


def test_wording_does_not_move_a_problem_across_the_split() -> None:
    """Both orders of a sum are one problem, whatever the words around it."""
    rng, keys = random.Random(0), {}
    for _ in range(20_000):
        p = FAMILIES["sum"].draw(rng, 0)
        (expr,) = re.findall(r"(\d+) ?([+-]) ?(\d+)", p.question)
        a, sign, b = expr
        name = (sign, *sorted((int(a), int(b))))
        assert keys.setdefault(name, p.key) == p.key


def test_every_small_talk_question_is_asked_in_several_ways() -> None:
    rng = random.Random(0)
    asked = {Chat().sample(rng) for _ in range(4000)}
    for question, reply in Chat().pairs():
        assert (question, reply) in asked
        assert (question.lower(), reply) in asked
