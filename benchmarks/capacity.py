"""How many requests a K/V pool holds, by what they ask of depth, and how fast so many decode.

    python -m benchmarks.capacity [--pages 8192] [--model FOLDER]

A fixed pool is filled with decoding requests of 1,024 tokens, then of 4,096, until one has to wait.
On a tiny random checkpoint, since how many fit does not depend on what a page holds; `--model`
names another one, for its decode rates.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.engines import MINI, ROOT, Engine, choose_dtype, machine, worker_cores
from benchmarks.random_checkpoint import PRESETS, write_checkpoint
from benchmarks.report import print_table
from benchmarks.workload import FULL, LOOPS, prompts

RESULTS = ROOT / "benchmarks" / "results" / "capacity.json"
SETTINGS: dict[str, dict[str, Any]] = {
    "full": FULL,
    "exact": {"exit_mode": "exact", "exit_threshold": 1.0},
    "skip 1.0": {"exit_mode": "skip", "exit_threshold": 0.0},
    "max_loops 2": FULL | {"max_loops": 2},
    "shared": {"exit_mode": "shared", "exit_threshold": 1.0},
}
LENGTHS = (1024, 4096)
BLOCK = 32
"""Positions of a page."""

STARTED = BLOCK - 1
"""Tokens that a request still has to go when it starts: within its last page, and no page more
while it is measured."""

STEPS = 3


def measure(ours: Engine, vocab: int, pages: int, length: int) -> list[dict[str, Any]]:
    """A row per setting, for requests of `length` tokens."""
    rows: list[dict[str, Any]] = []
    for name, extra in SETTINGS.items():
        many = prompts(pages * BLOCK // length + 1, length - STARTED, vocab, seed=length)
        found = ours.ask("fill", prompts=many, tokens=STARTED, steps=STEPS, extra=extra)
        full = rows[0]["requests"] if rows else found["requests"]
        rows.append(
            {"setting": name, "length": length, "over_full": found["requests"] / full, **found}
        )
        print(f"  {length} tokens, {name}: {found['requests']} requests", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pages", type=int, default=8192, help="of the pool")
    parser.add_argument("--model", type=Path, help="a checkpoint's folder")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--threads", type=int, help="of the engine (default: all cores but one)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    dtype, longest = choose_dtype(options.dtype, MINI), 2 * max(options.lengths)
    with tempfile.TemporaryDirectory() as scratch:
        shape = PRESETS["tiny"] | {"max_position_embeddings": longest}
        model = options.model or write_checkpoint(Path(scratch) / "tiny", **shape, dtype=dtype)
        vocab = json.loads((model / "config.json").read_text())["vocab_size"]
        settings = [
            *("--dtype", dtype, "--eager", "--max-model-len", str(longest)),
            # One page is nobody's.
            *("--pages", str(options.pages + 1), "--max-num-seqs", "1024"),
            *("--max-num-batched-tokens", str(8 * max(options.lengths))),
        ]
        with Engine("ours", model, worker_cores(options.threads), *settings) as ours:
            result: dict[str, Any] = {"machine": machine(ours), "dtype": dtype}
            result["pages"] = options.pages
            result["rows"] = [
                row
                for length in options.lengths
                for row in measure(ours, vocab, options.pages, length)
            ]
    print(
        f"\na pool of {options.pages} pages of {BLOCK} positions at one of {LOOPS} loops, {dtype}"
    )
    print_table(
        ("tokens", "setting", "requests", "over full", "pages a block", "tokens/s"),
        [
            (
                row["length"],
                row["setting"],
                row["requests"],
                f"{row['over_full']:.2f}",
                f"{sum(row['pages']) / row['requests'] / (row['length'] // BLOCK):.2f}",
                f"{row['rate']:.0f}",
            )
            for row in result["rows"]
        ],
    )
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
