"""The golden cases: what the released modeling code generated, as data.

Other suites use them too, such as a test that streams every case over HTTP.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "golden"
CHECKPOINTS = {name: str(FOLDER / name) for name in ("t4-mha", "t6-gqa")}
NEAR = 1e-4
"""Margin under which another order of float32 summation may flip a token or a depth."""


@dataclass(frozen=True)
class Case:
    """One golden generation.

    Attributes:
        checkpoint: its name; prompt: token ids. mode: `full`, `exact`, `skip` or `shared`.
        threshold: of the exit rule, 1 in `full`.
        tokens, depths, logprobs: of each generated token. margin: the closest decision's.
    """

    checkpoint: str
    prompt: tuple[int, ...]
    mode: str
    threshold: float
    tokens: tuple[int, ...]
    depths: tuple[int, ...]
    logprobs: tuple[float, ...]
    margin: float

    @property
    def name(self) -> str:
        return f"{self.checkpoint}-{len(self.prompt)}-{self.mode}-{self.threshold}"

    @property
    def depth_fields(self) -> dict[str, Any]:
        """The depth controls of this case, as a request states them."""
        if self.mode == "full":
            return {"exit_threshold": 1.0, "exit_mode": "skip"}
        return {"exit_threshold": self.threshold, "exit_mode": self.mode}


@cache
def golden_records(checkpoint: str) -> list[dict[str, Any]]:
    """The raw records of a checkpoint, one per prompt."""
    return json.loads((FOLDER / checkpoint / "golden.json").read_text())["records"]


MODES = ("full", "exact", "skip", "shared")
PLANES = ("full", "exact", "skip")
"""Modes; `PLANES` are those in which each loop has K/V of its own."""


def golden_cases(checkpoint: str, modes: tuple[str, ...] = PLANES) -> list[Case]:
    """Every case of `checkpoint` in `modes`."""
    cases = []
    for record in golden_records(checkpoint):
        for mode in modes:
            runs = {"1": record["full"]} if mode == "full" else record[mode]
            for threshold, run in runs.items():
                cases.append(
                    Case(
                        checkpoint=checkpoint,
                        prompt=tuple(record["prompt"]),
                        mode=mode,
                        threshold=float(threshold),
                        tokens=tuple(run["tokens"]),
                        depths=tuple(run["depths"]),
                        logprobs=tuple(run["logprobs"]),
                        margin=min(run["min_logit_margin"], run["min_cdf_margin"]),
                    )
                )
    return cases
