"""Two checkouts of this project against each other: decode speed, in turns on the same cores.

    git worktree add ../before COMMIT
    python -m benchmarks.versus ../before [--model mid] [--batches 1 8 32] [--rounds 5] [--tokens N]

Greedy tokens are compared first. A ratio is the median over rounds of this checkout's rate over the
other's in the same round; who goes first alternates. Both run with this environment's packages.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.decode import RESULTS, forced, make_model, tokens_for
from benchmarks.engines import Engine, choose_dtype, machine, worker_cores
from benchmarks.report import print_table
from benchmarks.workload import FULL, PROMPT, agreement, prompts

EXACT = {"exit_mode": "exact", "exit_threshold": 0.5}


def settings(mean: float | str, tokens: int, batch: int) -> list[dict[str, Any]]:
    """Fields of `batch` requests: a mean depth, or a mode by its name."""
    modes = {"full": FULL, "exact": EXACT, "lossless": {"exit_mode": "lossless"}}
    return [modes[mean]] * batch if isinstance(mean, str) else forced(mean, tokens, batch)


def measure(other: Path, options: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Rates of both by setting and batch."""
    dtype = choose_dtype("auto", model)
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    arguments = ("--dtype", dtype, "--max-model-len", "512", "--max-num-seqs", "32")
    cores = worker_cores(options.threads)
    with (
        Engine("ours", model, cores, *arguments) as here,
        Engine("ours", model, cores, *arguments, checkout=other) as there,
    ):
        engines = {"here": here, "there": there}
        asked = {"prompts": prompts(8, PROMPT, vocab, seed=99), "tokens": 32, "extra": [FULL] * 8}
        answers = [engine.ask("generate", **asked)["tokens"] for engine in engines.values()]
        equal = agreement(*answers)
        assert equal > 0.9, f"the checkouts answer differently: {equal:.1%} of tokens are equal"
        rows = []
        for batch in options.batches:
            tokens = options.tokens or tokens_for(batch)
            asked = {"prompts": prompts(batch, PROMPT, vocab, seed=batch), "tokens": tokens + 1}
            for mean in ("full", "exact", "lossless", 2.5, 1.5):
                rates: dict[str, list[float]] = {name: [] for name in engines}
                for turn in range(-1, options.rounds):
                    for name in sorted(engines, reverse=turn % 2 == 0):
                        extra = settings(mean, tokens, batch)
                        rate = engines[name].ask("decode", extra=extra, **asked)["rate"]
                        if turn >= 0:
                            rates[name].append(rate)
                pairs = zip(rates["here"], rates["there"], strict=True)
                ratio = statistics.median(a / b for a, b in pairs)
                rows.append({"batch": batch, "setting": mean, "ratio": ratio, "rounds": rates})
                print(f"  batch {batch}, {mean}: {ratio:.3f}", flush=True)
        return {"dtype": dtype, "machine": machine(here), "equal_tokens": equal, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("other", type=Path, help="the folder of the other checkout")
    parser.add_argument("--model", default="mid", help="a preset's name, or a folder")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, help="of each request, a multiple of 16")
    parser.add_argument("--threads", type=int, help="of each engine (default: all cores but one)")
    parser.add_argument("--output", type=Path, default=RESULTS / "versus.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = make_model(options.model, Path(scratch) / "model")
        result = measure(options.other.resolve(), options, model)
    print_table(
        ("batch", "setting", "this over the other"),
        [(row["batch"], row["setting"], f"{row['ratio']:.3f}") for row in result["rows"]],
    )
    options.output.write_text(json.dumps(result | {"model": options.model}, indent=1) + "\n")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
