"""What a calibration is asked to do: the options, checked."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ouro_runtime.config import DELTA, GATE, MARGIN, RULES
from ouro_server.calibrate.errors import CalibrationError
from ouro_server.presets import SHIPPED
from ouro_server.settings import OneLineParser

THRESHOLDS = {
    GATE: "0.95,0.9,0.8,0.7,0.6,0.5,0.45,0.4,0.35,0.3,0.25,0.2",
    MARGIN: "0.99,0.98,0.95,0.9,0.8,0.7,0.6,0.5,0.4,0.3,0.2,0.1",
    DELTA: "0.1,0.15,0.2,0.25,0.3,0.35,0.4,0.45,0.5,0.6,0.7,0.8",
}
"""By exit rule, in its own unit."""

MODES = ("skip", "exact")
"""Modes in which a threshold changes answers."""

CHECKS = ("agree", "expected")
NO_PROMISE = 3
"""Exit status of a calibration that can promise nothing."""


class Series(NamedTuple):
    """What thresholds are tested of: an exit rule in a mode."""

    rule: str
    mode: str

    @property
    def name(self) -> str:
        """The mode, with the rule before it if that is not the gate's."""
        return self.mode if self.rule == GATE else f"{self.rule} {self.mode}"

    @property
    def off(self) -> float:
        """The threshold that runs every loop."""
        return RULES[self.rule][1]


@dataclass(frozen=True)
class Plan:
    """The options that answers and promises depend on.

    Attributes:
        losses: share of answers that may be lost, a promise each.
        confidence: that all promises of all rules and modes hold.
        thresholds: by exit rule, from the safest to the cheapest; the one that turns the rule off
            is tested before them.
        check: `agree`: an answer is lost if it is not that of full depth, token for token;
            `expected`: if it is wrong where full depth is right.
        max_tokens: longest answer. chunk: questions answered between two saves.
    """

    losses: tuple[float, ...]
    confidence: float
    modes: tuple[str, ...]
    thresholds: Mapping[str, tuple[float, ...]]
    check: str
    max_tokens: int
    chunk: int

    @property
    def each(self) -> float:
        """The confidence that each promise needs so that all hold (Bonferroni)."""
        return 1 - (1 - self.confidence) / (len(self.losses) * len(self.series))

    @property
    def series(self) -> list[Series]:
        """All that is tested, in order."""
        return [Series(rule, mode) for rule in self.thresholds for mode in self.modes]

    @classmethod
    def of(cls, options: argparse.Namespace) -> "Plan":
        """From the command line.

        Raises:
            CalibrationError: naming the option and what is allowed.
        """
        losses = _numbers("--loss", options.loss, "above 0 and below 1", lambda v: 0 < v < 1)
        rules = _rules(options.rules)
        if options.thresholds is not None and len(rules) > 1:
            raise CalibrationError(
                "--thresholds are of one rule: leave them out, or calibrate one rule after the "
                "other, each with an --out of its own"
            )
        return cls(
            tuple(sorted(set(losses))),
            _number(
                "--confidence", options.confidence, "above 0.5 and below 1", lambda v: 0.5 < v < 1
            ),
            _modes(options.modes),
            {rule: _grid(rule, options.thresholds) for rule in rules},
            _one_of("--check", options.check, CHECKS),
            _integer("--max-tokens", options.max_tokens),
            _integer("--chunk", options.chunk),
        )


def build_parser() -> argparse.ArgumentParser:
    """The options of `ouro-serve calibrate`. Values stay text: `Plan.of` checks them."""
    parser = OneLineParser(
        prog="ouro-serve calibrate",
        usage="ouro-serve calibrate MODEL QUESTIONS.jsonl [options] [any option of vLLM's engine]",
        description="Find the lowest exit threshold that keeps a promise on your questions.\n"
        "MODEL answers them at full depth and at every threshold; the lowest is chosen whose\n"
        "loss is under the promised one with the confidence asked for. Writes a report\n"
        "(report.md, report.svg) and presets.yaml, which `ouro-serve --presets` takes.",
        epilog='QUESTIONS.jsonl has a JSON object a line: {"prompt": TEXT} or\n'
        '{"messages": [{"role": ROLE, "content": TEXT}, ...]}, and if you know it "expected":\n'
        "the right answer, or a list of them. They must be what will be asked: the promise holds\n"
        "for questions drawn like these, answered greedily.\n\n"
        f"Exit status: 0, {NO_PROMISE} if nothing can be promised, 2 for wrong input.",
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="A checkpoint folder, a Hugging Face id, or ouro-mini."
    )
    parser.add_argument("questions", metavar="QUESTIONS.jsonl", type=Path)
    add = parser.add_argument
    add(
        "--loss",
        metavar="SHARE[,SHARE..]",
        default="0.01",
        help="Share of answers that may be lost, above 0 and below 1; a preset for each.\n"
        "Default: %(default)s.",
    )
    add(
        "--confidence",
        metavar="P",
        default="0.95",
        help="That all promises of the run hold, above 0.5 and below 1. Default: %(default)s.",
    )
    add(
        "--modes",
        metavar="MODE[,MODE..]",
        default="skip",
        help=f"Of {', '.join(MODES)}. Default: %(default)s.",
    )
    add(
        "--rules",
        metavar="RULE[,RULE..]",
        default=GATE,
        help=f"Exit rules, of {', '.join(RULES)}; presets for each. Default: %(default)s.",
    )
    add(
        "--check",
        metavar="WHAT",
        default="agree",
        help="agree: an answer is lost unless it is that of full depth, token for token.\n"
        "expected: it is lost if it is wrong where that of full depth is right; every line\n"
        'needs "expected". Default: %(default)s.',
    )
    add(
        "--thresholds",
        metavar="Q[,Q..]",
        help="Thresholds to test, of one rule and in its unit. Default:\n"
        + "".join(f"{rule}: {grid}\n" for rule, grid in THRESHOLDS.items()),
    )
    add(
        "--max-tokens",
        metavar="N",
        default="256",
        help="Longest answer. Default: %(default)s.",
    )
    add(
        "--out",
        metavar="FOLDER",
        type=Path,
        default=Path("calibration"),
        help="Where to write; a run that was killed goes on from there. Default: %(default)s.",
    )
    add(
        "--presets",
        metavar="FILE",
        type=Path,
        default=SHIPPED,
        help="Presets to add the new ones to. Default: the shipped file.",
    )
    add(
        "--chunk",
        metavar="N",
        default="128",
        help="Questions answered at once, and lost by a kill at most. Default: %(default)s.",
    )
    return parser


def _number(name: str, text: str, allowed: str, holds: Callable[[float], bool]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not holds(value):  # NaN compares false
        raise CalibrationError(f"{name} must be {allowed}, got {text!r}")
    return value


def _numbers(
    name: str, text: str, allowed: str, holds: Callable[[float], bool]
) -> tuple[float, ...]:
    return tuple(_number(name, part, allowed, holds) for part in text.split(","))


def _integer(name: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise CalibrationError(f"{name} must be an integer of 1 or more, got {text!r}")
    return int(text)


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise CalibrationError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return str(value)


def _rules(text: str) -> tuple[str, ...]:
    rules = tuple(dict.fromkeys(text.split(",")))
    return tuple(_one_of("--rules", rule, tuple(RULES)) for rule in rules)


def _grid(rule: str, text: str | None) -> tuple[float, ...]:
    """The thresholds of a rule, the nearest to full depth first."""
    most, off = RULES[rule]
    allowed = f"from 0 to {most:g} for the rule {rule}"
    text = THRESHOLDS[rule] if text is None else text
    found = _numbers("--thresholds", text, allowed, lambda v: 0 <= v <= most)
    grid = tuple(sorted({v for v in found if v != off}, key=lambda v: abs(v - off)))
    if not grid:
        raise CalibrationError(f"--thresholds must have another one than {off:g} among them")
    return grid


def _modes(text: str) -> tuple[str, ...]:
    modes = tuple(dict.fromkeys(text.split(",")))
    for mode in modes:
        if mode in ("lossless", "auto"):
            raise CalibrationError(
                f"--modes: {mode} has nothing to calibrate: "
                + (
                    "its answers are those of full depth at any threshold"
                    if mode == "lossless"
                    else "it stands for lossless or skip; say skip"
                )
            )
        _one_of("--modes", mode, MODES)
    return modes
