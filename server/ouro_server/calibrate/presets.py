"""The presets file of a calibration: another one's presets, and one for each promise kept."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ouro_runtime.config import GATE
from ouro_server.calibrate.choose import Choice
from ouro_server.calibrate.plan import Plan, Series


@dataclass(frozen=True)
class Promise:
    """One promise and what came of it."""

    plan: Plan
    series: Series
    choice: Choice

    @property
    def name(self) -> str:
        """`agree-99`: 1 % of answers at most are not full depth's; `keep-99`: 1 % at most are wrong
        where full depth is right. Modes other than skip and rules other than gate are named."""
        word = "agree" if self.plan.check == "agree" else "keep"
        share = f"{round(100 * (1 - self.choice.loss), 9):.12g}"
        rule, mode = self.series
        return "-".join(
            [word, share, *([] if mode == "skip" else [mode]), *([] if rule == GATE else [rule])]
        )

    @property
    def text(self) -> str:
        """What is promised, as a sentence."""
        share = f"{round(100 * self.choice.loss, 9):.12g} %"
        if self.plan.check == "agree":
            return f"At most {share} of answers are not those of full depth, token for token."
        return f"At most {share} of answers are wrong where full depth is right."


def content(base: Path, promises: Iterable[Promise], questions: int, loops: int) -> dict[str, Any]:
    """A presets file: `base`, and what could be promised from so many `questions`."""
    merged = yaml.safe_load(base.read_text(encoding="utf-8")) or {}
    added = {}
    for promise in promises:
        point = promise.choice.chosen
        if point is not None:
            added[promise.name] = {
                "description": f"{promise.text} Greedy, up to {promise.plan.max_tokens} tokens; "
                f"{100 * promise.plan.confidence:g} % confidence from {questions} questions, "
                f"{point.lost} lost, mean depth {point.mean_depth:.2f}.",
                "exit_threshold": point.threshold,
                "min_loops": 1,
                "max_loops": loops,
                "exit_mode": promise.series.mode,
                "exit_rule": promise.series.rule,
            }
    return merged | {"presets": (merged.get("presets") or {}) | added}


def write(path: Path, presets: dict[str, Any], source: str) -> None:
    """The file, with a line that says where it comes from."""
    text = yaml.safe_dump(presets, sort_keys=False, allow_unicode=True, width=96)
    path.write_text(f"# Written by ouro-serve calibrate: {source}.\n\n{text}", encoding="utf-8")
