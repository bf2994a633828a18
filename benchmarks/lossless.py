"""What drafts bring: lossless requests against the same requests without drafts, on one engine.

    python -m benchmarks.lossless [--rounds 5] [--batches 1 8 32]

`make bench` runs it beside the others. Two random checkpoints of one shape: `mid`, where no draft
is right, so that drafts can only cost; and `mid-settled`, whose later loops move the state little.
Tokens are compared first; then the settings take turns, and ratios are of the same round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.engines import MINI, ROOT, Engine, choose_dtype, machine, worker_cores
from benchmarks.random_checkpoint import PRESETS, write_checkpoint
from benchmarks.report import print_table
from benchmarks.workload import (
    FULL,
    LOOPS,
    PROMPT,
    agreement,
    bound,
    drafted,
    fit_line,
    prompts,
)

RULE = {"exit_mode": "lossless"}
LATER = {"exit_mode": "lossless", "min_loops": 2}
FIXED = {depth: FULL | {"max_loops": depth} for depth in (1, 2)}
MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "mid": {"lossless": RULE},
    "mid-settled": {"lossless": RULE, "from loop 2": LATER},
}
"""Checkpoints, and what is measured on each beside full depth."""

BATCHES = (1, 8, 32)
RESULTS = ROOT / "benchmarks" / "results" / "lossless.json"


def tokens_for(batch: int) -> int:
    """Tokens per request after the first."""
    return 32 if batch <= 8 else 16


class Rates:
    """Tokens per second by setting, one entry a round."""

    def __init__(self, ours: Engine, vocab: int, batch: int) -> None:
        self.ours, self.batch = ours, batch
        tokens = tokens_for(batch)
        self.asked = {"prompts": prompts(batch, PROMPT, vocab, seed=batch), "tokens": tokens + 1}
        self.rounds: dict[str, list[float]] = {}

    def run(self, settings: dict[str, dict[str, Any]], rounds: int) -> None:
        """All settings in turn; the round before the first warms up, and teaches the rule."""
        self.rounds = {name: [] for name in settings}
        for turn in range(-1, rounds):
            order = list(settings) if turn % 2 else list(reversed(settings))
            began = time.monotonic()
            for name in order:
                extra = [settings[name]] * self.batch
                rate = self.ours.ask("decode", extra=extra, **self.asked)["rate"]
                if turn >= 0:
                    self.rounds[name].append(rate)
            took = time.monotonic() - began
            print(f"  batch {self.batch}, round {turn + 1}: {took:.0f} s", flush=True)

    def median(self, name: str) -> float:
        return statistics.median(self.rounds[name])

    def over_full(self, name: str) -> float:
        pairs = zip(self.rounds[name], self.rounds["full"], strict=True)
        return statistics.median(mine / full for mine, full in pairs)

    def profile(self, extra: dict[str, Any]) -> tuple[float, dict[str, float]]:
        """Passes of the block per token of a request, and where the time of a pass goes."""
        report = self.ours.ask("profile", extra=[extra] * self.batch, **self.asked)
        return self.batch * report["passes_per_token"], report


def costs(ours: Engine, vocab: int, batch: int) -> tuple[dict[int, float], dict[int, float]]:
    """Seconds of the block by its rows, from `batch` to T times as many, and of the product with
    the vocabulary; every other cost of a pass is left out, so a bound made of these is generous."""
    blocks = {}
    for rows in (batch * loop for loop in range(1, LOOPS + 1)):
        asked = {"prompts": prompts(rows, PROMPT, vocab, seed=rows), "tokens": 9}
        report = ours.ask("profile", extra=[FULL] * rows, **asked)
        assert report["rows_per_pass"] == rows, report
        blocks[rows] = report["block_ms"] / 1e3
    heads = sorted({max(1, batch // 2), batch, 2 * batch})
    return blocks, dict(zip(heads, ours.ask("read_out", rows=heads)["seconds"], strict=True))


def compare_tokens(ours: Engine, vocab: int) -> dict[str, Any]:
    """Greedy tokens with drafts and without; and how many read-outs after each loop are loop T's.

    Raises:
        AssertionError: if more than a few tokens differ: no speed is worth measuring then.
    """
    asked = {"prompts": prompts(8, PROMPT, vocab, seed=99), "tokens": 48}
    full = ours.ask("generate", extra=[FULL] * 8, **asked)["tokens"]
    equal, agreeing = [], {}
    for depth in range(1, LOOPS):
        extra = [{"exit_mode": "lossless", "forced_depths": [depth]}] * 8
        answer = ours.ask("generate", extra=extra, **asked)
        equal.append(agreement(full, answer["tokens"]))
        known = [d for depths in answer["depths"] for d in depths[1:-1]]
        agreeing[str(depth)] = sum(d == depth for d in known) / len(known)
    assert min(equal) > 0.9, f"lossless answers differ from full depth: {equal}"
    return {"equal_tokens": min(equal), "agreeing_read_outs": agreeing}


def measure_batch(
    ours: Engine, vocab: int, batch: int, rounds: int, modes: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """A row per setting, with the bound that its passes a token set."""
    settings = {"full": FULL, **modes}
    if batch == 1:
        settings |= {f"fixed {depth}": extra for depth, extra in FIXED.items()}
    rates = Rates(ours, vocab, batch)
    rates.run(settings, rounds)
    blocks, heads = costs(ours, vocab, batch) if batch > 1 else ({}, {})
    rows = []
    for name, extra in modes.items():
        passes, profile = rates.profile(extra)
        row: dict[str, Any] = {
            "batch": batch,
            "setting": name,
            "full_tokens_per_second": rates.median("full"),
            "tokens_per_second": rates.median(name),
            "over_full": rates.over_full(name),
            "passes_per_token": passes,
            "profile": profile,
        }
        if batch == 1:
            seconds = {depth: 1 / rates.median(f"fixed {depth}") for depth in FIXED}
            f0, f1 = fit_line(seconds | {LOOPS: 1 / rates.median("full")})
            row["bound"] = bound(f0, f1, LOOPS, passes)
        else:
            row["bound"] = drafted(blocks, heads, batch, LOOPS, passes)
        row["of_bound"] = row["over_full"] / row["bound"]
        rows.append(row | {"rounds": {n: rates.rounds[n] for n in ("full", name)}})
    return rows


def measure_lossless(
    scratch: Path,
    dtype: str,
    rounds: int,
    cores: list[int],
    batches: Sequence[int] = BATCHES,
    models: Sequence[str] = tuple(MODELS),
) -> dict[str, Any]:
    """The checkpoints named, see the top of this file; they are written to `scratch`."""
    result: dict[str, Any] = {"dtype": dtype}
    for name in models:
        modes = MODELS[name]
        model = write_checkpoint(scratch / name, **PRESETS[name], dtype=dtype)
        vocab = PRESETS[name]["vocab_size"]
        seats = LOOPS * max(batches)  # `costs` fills them
        options = ("--dtype", dtype, "--max-model-len", "512", "--max-num-seqs", str(seats))
        with Engine("ours", model, cores, *options, "--pages", str(LOOPS * seats + 1)) as ours:
            result["machine"] = machine(ours)
            checked = compare_tokens(ours, vocab)
            rows = [
                row for batch in batches for row in measure_batch(ours, vocab, batch, rounds, modes)
            ]
        result[name] = checked | {"rows": rows}
        print_lossless(name, result[name])
    return result


def print_lossless(name: str, measured: dict[str, Any]) -> None:
    """One checkpoint's table."""
    agreeing = ", ".join(f"{d}: {s:.0%}" for d, s in measured["agreeing_read_outs"].items())
    print(
        f"\nlossless on {name}: {measured['equal_tokens']:.1%} of tokens before a first "
        f"difference; read-outs that are loop T's, by loop: {agreeing}"
    )
    print_table(
        (
            "batch",
            "setting",
            "tokens/s",
            "full depth",
            "over full",
            "passes / token",
            "bound",
            "of it",
        ),
        [
            (
                row["batch"],
                row["setting"],
                f"{row['tokens_per_second']:.1f}",
                f"{row['full_tokens_per_second']:.1f}",
                f"{row['over_full']:.2f}",
                f"{row['passes_per_token']:.2f}",
                f"{row['bound']:.2f}",
                f"{row['of_bound']:.2f}",
            )
            for row in measured["rows"]
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--threads", type=int, help="of the engine (default: all cores but one)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    dtype = choose_dtype(options.dtype, MINI)
    with tempfile.TemporaryDirectory() as scratch:
        cores = worker_cores(options.threads)
        result = measure_lossless(
            Path(scratch), dtype, options.rounds, cores, options.batches, options.models
        )
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
