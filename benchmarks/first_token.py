"""Time to the first token of a long prompt, by `max_loops`: loops that nobody reads are not run.

    python -m benchmarks.first_token [--prompt 1500] [--rounds 5]

On the mid-size random checkpoint. First, tokens: those of each `max_loops` must be what they are
when the prompt runs every loop, which a request does that asks for its prompt's log-probabilities.
Then each takes its turn in every round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.engines import MINI, ROOT, Engine, choose_dtype, machine, worker_cores
from benchmarks.random_checkpoint import PRESETS, write_checkpoint
from benchmarks.report import print_table
from benchmarks.workload import LOOPS, agreement, prompts

RESULTS = ROOT / "benchmarks" / "results" / "first_token.json"
CAPS = range(1, LOOPS + 1)
ANSWERED = 16
"""Tokens compared of each request."""


def capped(loops: int) -> dict[str, Any]:
    """The depth controls of a request that goes to `loops` with every token."""
    return {"exit_mode": "skip", "exit_threshold": 1.0, "max_loops": loops}


def compare_tokens(ours: Engine, vocab: int, length: int) -> dict[str, float]:
    """By `max_loops`, the share of tokens before a first difference from a prompt of all loops.

    Raises:
        AssertionError: if more than a few differ: no speed is worth measuring then.
    """
    asked = {"prompts": prompts(4, length, vocab, seed=7), "tokens": ANSWERED}
    equal = {}
    for loops in CAPS:
        extra = [capped(loops)] * 4
        whole = ours.ask("generate", extra=extra, prompt_logprobs=0, **asked)["tokens"]
        equal[str(loops)] = agreement(whole, ours.ask("generate", extra=extra, **asked)["tokens"])
    assert min(equal.values()) > 0.9, f"a capped prompt answers otherwise: {equal}"
    return equal


def measure(ours: Engine, vocab: int, length: int, rounds: int) -> dict[str, list[float]]:
    """Seconds to the first token by `max_loops`, one entry a round; the first round warms up."""
    seconds: dict[str, list[float]] = {str(loops): [] for loops in CAPS}
    for turn in range(-1, rounds):
        for loops in CAPS if turn % 2 else reversed(CAPS):
            asked = prompts(1, length, vocab, seed=100 + turn)
            answer = ours.ask("decode", prompts=asked, tokens=1, extra=[capped(loops)])
            if turn >= 0:
                seconds[str(loops)].append(1 / answer["overall"])
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompt", type=int, default=1500, help="tokens")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of the engine (default: all cores but one)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    dtype, shape = choose_dtype(options.dtype, MINI), PRESETS["mid"]
    with tempfile.TemporaryDirectory() as scratch:
        model = write_checkpoint(Path(scratch) / "mid", **shape, dtype=dtype)
        longest = str(options.prompt + 4 * ANSWERED)
        settings = ("--dtype", dtype, "--max-model-len", longest, "--max-num-seqs", "4")
        with Engine("ours", model, worker_cores(options.threads), *settings) as ours:
            vocab = shape["vocab_size"]
            result: dict[str, Any] = {"machine": machine(ours), "dtype": dtype}
            result["prompt"] = options.prompt
            result["equal_tokens"] = compare_tokens(ours, vocab, min(options.prompt, 200))
            result["seconds"] = measure(ours, vocab, options.prompt, options.rounds)
    full = result["seconds"][str(LOOPS)]
    result["over_full"] = {
        loops: statistics.median(mine / whole for mine, whole in zip(runs, full, strict=True))
        for loops, runs in result["seconds"].items()
    }
    print(f"\na prompt of {options.prompt} tokens, {dtype}")
    print_table(
        ("max_loops", "ms to first token", "of all loops", "equal tokens"),
        [
            (
                loops,
                f"{1000 * statistics.median(runs):.0f}",
                f"{result['over_full'][loops]:.2f}",
                f"{result['equal_tokens'][loops]:.1%}",
            )
            for loops, runs in result["seconds"].items()
        ],
    )
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
