"""Scoring held-out problems by family, difficulty and depth, and the targets of `ouro-mini`."""

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ouro_runtime.training.reference import STOP_IDS, Controls
from ouro_runtime.training.tasks import FAMILIES, Problem
from ouro_runtime.training.tokenizer import render

Cell = tuple[str, int]
"""(family, level)."""


@dataclass(frozen=True)
class Setting:
    """One point of a sweep: which gate, and the depth controls."""

    gate: str
    controls: Controls

    @property
    def by(self) -> str:
        """What tokens leave by: the gate, or the name of another exit rule."""
        return self.gate if self.controls.exit_rule == "gate" else self.controls.exit_rule

    @property
    def label(self) -> str:
        c = self.controls
        if c.off:
            return f"{c.exit_mode} depth {c.max_loops}"
        return f"{self.by} {c.exit_mode} q={c.exit_threshold:g}"


@dataclass
class Score:
    """Of one cell: exact matches of `problems`, and of `tokens` how many at each depth."""

    problems: int
    right: int
    tokens: int
    histogram: list[int]

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100 * self.right / self.problems

    @property
    def depth(self) -> float:
        """Mean depth over generated tokens, the stop token included."""
        return sum(d * n for d, n in enumerate(self.histogram, 1)) / max(1, self.tokens)


@dataclass
class Result:
    setting: Setting
    cells: dict[Cell, Score] = field(default_factory=dict)

    def total(self, family: str | None = None) -> Score:
        """All cells together, or those of one family."""
        chosen = [s for (f, _), s in self.cells.items() if family in (None, f)]
        return Score(
            sum(s.problems for s in chosen),
            sum(s.right for s in chosen),
            sum(s.tokens for s in chosen),
            [sum(n) for n in zip(*(s.histogram for s in chosen), strict=True)],
        )

    @classmethod
    def from_dict(cls, kept: Mapping[str, Any]) -> "Result":
        """The inverse of `to_dict`."""
        controls = {f.name: kept[f.name] for f in fields(Controls) if f.name in kept}
        names = [f.name for f in fields(Score)]
        cells = {
            (cell["family"], cell["level"]): Score(**{name: cell[name] for name in names})
            for cell in kept["cells"]
        }
        return cls(Setting(kept["gate"], Controls(**controls)), cells)

    def to_dict(self) -> dict[str, Any]:
        return {
            "label": self.setting.label,
            "gate": self.setting.gate,
            **asdict(self.setting.controls),
            "accuracy": self.total().accuracy,
            "mean_depth": self.total().depth,
            "cells": [
                {
                    "family": f,
                    "level": n,
                    "accuracy": s.accuracy,
                    "mean_depth": s.depth,
                    **asdict(s),
                }
                for (f, n), s in self.cells.items()
            ],
        }


def suite(count: int, seed: int = 1) -> dict[Cell, list[Problem]]:
    """`count` held-out problems of every family and shipped level."""
    cells: dict[Cell, list[Problem]] = {}
    for name, family in FAMILIES.items():
        for level in range(1, family.top + 1):
            rng = random.Random(f"suite {seed} {name} {level}")
            cells[name, level] = [family.sample(rng, level, "test") for _ in range(count)]
    return cells


def prompts_of(problems: Sequence[Problem], tok: Tokenizer) -> list[list[int]]:
    """Token ids of each question as a one-turn chat."""
    return [tok.encode(render([("user", p.question)], reply=True)).ids for p in problems]


def score(
    problems: Sequence[Problem],
    tokens: Sequence[Sequence[int]],
    depths: Sequence[Sequence[int]],
    tok: Tokenizer,
    loops: int,
) -> Score:
    """Exact matches and depths of the replies `tokens`, stop token included."""
    right, histogram = 0, [0] * loops
    for problem, reply, depth in zip(problems, tokens, depths, strict=True):
        text = tok.decode([t for t in reply if t not in STOP_IDS], skip_special_tokens=False)
        right += bool(reply) and reply[-1] in STOP_IDS and problem.verify(text)
        for d in depth:
            histogram[d - 1] += 1
    return Score(len(problems), right, sum(map(len, depths)), histogram)


@dataclass
class Check:
    """One target: what must be true, what was measured, and whether it holds."""

    target: str
    measured: str
    holds: bool


def fixed_at(fixed: Sequence[Result], depth: float, family: str | None = None) -> float:
    """Accuracy of fixed depths at a mean depth between them, linearly interpolated."""
    points = [(r.setting.controls.max_loops, r.total(family).accuracy) for r in fixed]
    return float(np.interp(depth, [p[0] for p in points], [p[1] for p in points]))


def checks(fixed: list[Result], gated: list[Result]) -> tuple[list[Check], Result | None]:
    """The issue's targets, and the gated setting to recommend: the least mean depth within a point
    of full depth. `fixed` are depths 1..T in order, `gated` thresholds of the shipped gate."""
    full, out = fixed[-1], []
    names = sorted({f for f, _ in full.cells}, key=list(FAMILIES).index)
    tops = {f: max(n for g, n in full.cells if g == f) for f in names}
    middle = {f: full.cells[f, (tops[f] + 1) // 2].accuracy for f in names}
    hardest = {f: [r.cells[f, tops[f]].accuracy for r in fixed] for f in names}
    out.append(
        Check("full depth, middle difficulty >= 95 %", _each(middle), min(middle.values()) >= 95)
    )
    top = {f: a[-1] for f, a in hardest.items()}
    out.append(Check("full depth, hardest difficulty >= 80 %", _each(top), min(top.values()) >= 80))
    half = {f: a[0] for f, a in hardest.items()}
    wins = [f for f, a in hardest.items() if a[0] < a[-1] / 2 and a[-1] - a[1] >= 10]
    gains = {f: a[-1] - a[1] for f, a in hardest.items()}
    out.append(
        Check(
            "three families, hardest: depth 1 < half of depth 4, depth 4 >= depth 2 + 10",
            f"depth 1: {_each(half)}; depth 4 less depth 2: {_each(gains)}",
            len(wins) >= 3,
        )
    )
    change = {f: full.total(f).accuracy - fixed[-2].total(f).accuracy for f in names}
    out.append(
        Check(
            "no family loses > 1 point from depth 3 to 4", _each(change), min(change.values()) >= -1
        )
    )
    near = [r for r in gated if r.total().accuracy >= full.total().accuracy - 1]
    best = min(near, key=lambda r: r.total().depth, default=None)
    if best is not None:
        b = best.total()
        measured = (
            f"q = {best.setting.controls.exit_threshold:g}: depth {b.depth:.2f}, "
            f"{b.accuracy:.1f} of {full.total().accuracy:.1f} %"
        )
        out.append(
            Check("mean depth <= 2.0 within 1 point of full depth", measured, b.depth <= 2.0)
        )
        rising = {
            f: [best.cells[f, n].depth for n in range(1, tops[f] + 1)] for f in names if f in wins
        }
        grows = {f: all(a < b for a, b in itertools.pairwise(ds)) for f, ds in rising.items()}
        text = "; ".join(
            f"{f} {' '.join(f'{d:.2f}' for d in ds)}{'' if grows[f] else ' (not at every step)'}"
            for f, ds in rising.items()
        )
        out.append(
            Check(
                "in three of those families mean depth grows with difficulty, step by step",
                text,
                sum(grows.values()) >= 3,
            )
        )
    edge = [r.total().accuracy - fixed_at(fixed, r.total().depth) for r in gated]
    out.append(
        Check(
            "at equal mean depth: gate beats fixed depth by >= 5 points somewhere, never loses",
            f"best {max(edge):+.1f}, worst {min(edge):+.1f}",
            max(edge) >= 5 and min(edge) >= 0,
        )
    )
    return out, best


def check_shared(results: Sequence[Result]) -> list[Check]:
    """That mode `shared` answers what `skip` does, at full depth and at 0.5, as far as both were
    measured; `results` are of one gate."""
    of = {r.setting.controls: r.total().accuracy for r in results}
    out = []
    for name, controls in (("full depth", Controls()), ("0.5", Controls(0.5))):
        skip, shared = of.get(controls), of.get(replace(controls, exit_mode="shared"))
        if skip is not None and shared is not None:
            measured = f"{shared:.2f} of {skip:.2f} %"
            out.append(
                Check(f"`shared` at {name}: within 1 point of `skip`", measured, shared >= skip - 1)
            )
    return out


def _each(values: dict[str, float]) -> str:
    return ", ".join(f"{f} {v:.1f}" for f, v in values.items())
