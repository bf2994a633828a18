"""`make bench`: decode speed of this engine and of the stock looped model, side by side.

    python -m benchmarks.decode [--model mid|mini|FOLDER] [--rounds 5] [--batches 1 4 8 16 32]

Both engines live in processes of their own on the same cores and take turns, A B A B, so that a
drift of the machine meets both. Tokens are compared first. Rates are decode only: from when every
request has its first token to the end. README.md in this folder says how to read the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from operator import eq
from pathlib import Path
from typing import Any

from benchmarks.engines import MINI, ROOT, Engine, choose_dtype, machine, worker_cores
from benchmarks.lossless import measure_lossless
from benchmarks.random_checkpoint import PRESETS, write_checkpoint
from benchmarks.report import print_batches, print_checks, print_extras, print_profiles
from benchmarks.workload import (
    FULL,
    LOOPS,
    PROMPT,
    agreement,
    bound,
    depth_lists,
    fit_line,
    prompts,
    reachable,
)

GOLDEN = ROOT / "tests" / "golden" / "t4-mha"
RESULTS = ROOT / "benchmarks" / "results"
MEANS = (4.0, 2.5, 1.5)
PREFILL = 64
FIXED = (1, 2, LOOPS)
"""Depths that F0 and F1 are fitted to."""

Rates = dict[str, list[float]]


def tokens_for(batch: int) -> int:
    """Tokens per request after the first: more where a step is short."""
    return 32 if batch == 1 else 16


def forced(mean: float, tokens: int, batch: int, mode: str = "skip") -> list[dict[str, Any]]:
    """Depth controls of a batch whose tokens have this mean depth."""
    if mean == LOOPS:
        return [FULL] * batch
    return [
        {"forced_depths": depths, "exit_mode": mode} for depths in depth_lists(mean, tokens, batch)
    ]


def check_golden(cores: list[int]) -> dict[str, Any]:
    """float32, golden checkpoint: both engines give the released code's tokens at full depth.

    Raises:
        AssertionError: if they do not; no speed is worth measuring then.
    """
    records = json.loads((GOLDEN / "golden.json").read_text())["records"]
    asked = {
        "prompts": [record["prompt"] for record in records],
        "tokens": len(records[0]["full"]["tokens"]),
        "extra": [FULL] * len(records),
    }
    options = ("--dtype", "float32", "--eager", "--max-model-len", "256")
    for kind in ("baseline", "ours"):
        with Engine(kind, GOLDEN, cores, *options) as engine:
            tokens = engine.ask("generate", **asked)["tokens"]
        expected = [record["full"]["tokens"] for record in records]
        assert tokens == expected, f"{kind}: not the golden tokens at full depth"
    return {"prompts": len(records), "tokens": sum(map(len, expected)), "equal": True}


def check_agreement(baseline: Engine, ours: Engine, vocab: int) -> dict[str, Any]:
    """Greedy tokens at full depth on the measured checkpoint, in its own precision."""
    asked = {"prompts": prompts(8, PROMPT, vocab, seed=99), "tokens": 12, "extra": [FULL] * 8}
    left, right = (engine.ask("generate", **asked)["tokens"] for engine in (baseline, ours))
    return {"agreement": agreement(left, right), "equal": sum(map(eq, left, right))}


def measure_batch(
    baseline: Engine, ours: Engine, vocab: int, batch: int, rounds: int, field: str, length: int
) -> dict[str, Any]:
    """All depths at one batch size; round by round, the engines in turn."""
    tokens = tokens_for(batch)
    asked = {"prompts": prompts(batch, length, vocab, seed=batch), "tokens": tokens + 1}
    settings = {f"{mean:g}": forced(mean, tokens, batch) for mean in MEANS}
    settings |= {f"fixed {d}": [{"max_loops": d, **FULL}] * batch for d in FIXED[:-1]}
    if batch == 1:
        settings["exact 2"] = forced(2.0, tokens, batch, "exact")
    rates: Rates = {"baseline": [], **{name: [] for name in settings}}

    def run_baseline() -> None:
        rates["baseline"].append(baseline.ask("decode", extra=[None] * batch, **asked)[field])

    def run_ours() -> None:
        for name, extra in settings.items():
            rates[name].append(ours.ask("decode", extra=extra, **asked)[field])

    for turn in range(-1, rounds):
        began = time.monotonic()
        for run in (run_baseline, run_ours) if turn % 2 == 0 else (run_ours, run_baseline):
            run()
        if turn < 0:
            # The first round compiles and warms up.
            for values in rates.values():
                values.clear()
        print(f"  batch {batch}, round {turn + 1}: {time.monotonic() - began:.0f} s", flush=True)
    rows = [batch, *(max(1, round(batch / mean)) for mean in MEANS)]
    together, *spread = ours.ask("read_out", rows=rows)["seconds"]
    return summarise(rates, batch, together, dict(zip(MEANS, spread, strict=True)))


def summarise(
    rates: Rates, batch: int, together: float, spread: dict[float, float]
) -> dict[str, Any]:
    """Medians, ratios of the same round, and the bounds.

    Args:
        together, spread: as in `reachable`; `spread` by mean depth.
    """
    median = {name: statistics.median(values) for name, values in rates.items()}
    fixed_depths = {d: batch / median[f"fixed {d}"] for d in FIXED[:-1]}
    fixed_depths[LOOPS] = batch / median[f"{LOOPS}"]
    f0, f1 = fit_line(fixed_depths)

    def ratio(name: str, other: str) -> float:
        pairs = zip(rates[name], rates[other], strict=True)
        return statistics.median(left / right for left, right in pairs)

    rows = []
    for name in [f"{mean:g}" for mean in MEANS] + (["exact 2"] if "exact 2" in rates else []):
        mean = float(name.split()[-1])
        row: dict[str, Any] = {
            "depth": name,
            "tokens_per_second": median[name],
            "over_baseline": ratio(name, "baseline"),
            "over_full": ratio(name, f"{LOOPS}"),
            "loops_over_depth": LOOPS / mean,
            "bound": bound(f0, f1, LOOPS, mean),
            "reachable": 1.0
            if mean == LOOPS
            else reachable(f0, f1, LOOPS, mean, batch, together, spread.get(mean, together)),
        }
        row["of_bound"] = row["over_full"] / row["bound"]
        row["of_reachable"] = row["over_full"] / row["reachable"]
        rows.append(row)
    return {
        "batch": batch,
        "baseline_tokens_per_second": median["baseline"],
        "f0_ms": 1e3 * f0,
        "f1_ms": 1e3 * f1,
        "read_out_ms": 1e3 * together,
        "read_out_of_a_pass_ms": {f"{mean:g}": 1e3 * value for mean, value in spread.items()},
        "rows": rows,
        "rounds": rates,
    }


def measure_thresholds(ours: Engine, vocab: int, rounds: int) -> list[dict[str, float]]:
    """Two requests of different thresholds in one batch: what each gets of it."""
    asked = {
        "prompts": prompts(2, PROMPT, vocab, seed=7),
        "tokens": 48,
        "extra": [{"exit_threshold": 0.3, "exit_mode": "skip"}, FULL],
        "watched": [0, 1],
    }
    runs = [ours.ask("watch", **asked) for _ in range(rounds)]
    return [
        {
            "exit_threshold": threshold,
            "mean_depth": statistics.median(run["mean_depths"][place] for run in runs),
            "tokens_per_second": statistics.median(run["rates"][place] for run in runs),
        }
        for place, threshold in enumerate((0.3, 1.0))
    ]


def measure_neighbours(ours: Engine, vocab: int, rounds: int, batch: int = 8) -> dict[str, float]:
    """How much a full-depth request is slowed when its neighbours skip."""
    asked = {"prompts": prompts(batch, PROMPT, vocab, seed=8), "tokens": 32, "watched": [0]}
    skipping = forced(1.5, 256, batch)
    skipping[0] = FULL
    whole, rest = [], []
    for _ in range(rounds):
        full, beside = (
            ours.ask("watch", extra=extra, **asked) for extra in ([FULL] * batch, skipping)
        )
        ratio = full["rates"][0] / beside["rates"][0]
        whole.append(ratio - 1)
        rest.append(ratio * (1 - beside["read_out_share"]) / (1 - full["read_out_share"]) - 1)
    return {
        "batch": batch,
        "neighbours_mean_depth": 1.5,
        "slowdown": statistics.median(whole),
        "slowdown_without_read_out": statistics.median(rest),
    }


def make_model(name: str, folder: Path) -> Path:
    """The folder of what `--model` names; writes the random mid-size checkpoint."""
    if name == "mini":
        return MINI
    if name in PRESETS:
        tokenizer = MINI if MINI.exists() else None
        return write_checkpoint(folder / name, **PRESETS[name], tokenizer=tokenizer)
    return Path(name)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="mid", help="mid, mini, another preset or a folder")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--threads", type=int, help="of each engine (default: all cores but one)")
    parser.add_argument("--eager", action="store_true", help="without compilation, both engines")
    parser.add_argument(
        "--prefill", action="store_true", help=f"count prefill, of {PREFILL}-token prompts"
    )
    parser.add_argument("--http", action="store_true", help="also with the HTTP server in front")
    parser.add_argument("--only-http", action="store_true", help="nothing but the HTTP run")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/decode.json")
    return parser.parse_args()


def measure(options: argparse.Namespace, model: Path, dtype: str) -> dict[str, Any]:
    """Everything but HTTP."""
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    cores = worker_cores(options.threads)
    field, length = ("overall", PREFILL) if options.prefill else ("rate", PROMPT)
    result: dict[str, Any] = {"golden_float32": check_golden(cores)}
    budget = str(max(options.batches) * length + 64)
    extra: tuple[str, ...] = (
        "--dtype",
        dtype,
        "--max-num-batched-tokens",
        budget,
        "--max-model-len",
        "512",
    )
    extra += ("--max-num-seqs", str(max(*options.batches, 8)))
    extra += ("--eager",) if options.eager else ()
    with (
        Engine("baseline", model, cores, *extra) as baseline,
        Engine("ours", model, cores, *extra) as ours,
    ):
        result["machine"] = machine(ours)
        result["full_depth_agreement"] = check_agreement(baseline, ours, vocab)
        print_checks(result)
        result["batches"] = []
        for batch in options.batches:
            measured = measure_batch(baseline, ours, vocab, batch, options.rounds, field, length)
            result["batches"].append(measured)
        result["thresholds"] = measure_thresholds(ours, vocab, options.rounds)
        result["neighbours"] = measure_neighbours(ours, vocab, options.rounds)
        largest = max(options.batches)
        tokens = tokens_for(largest)
        asked = {"prompts": prompts(largest, PROMPT, vocab, seed=largest), "tokens": tokens + 1}
        result["profiles"] = [
            {"batch": largest, "mean_depth": mean}
            | ours.ask("profile", extra=forced(mean, tokens, largest), **asked)
            for mean in MEANS
        ]
    print_batches(result["batches"])
    print_extras(result)
    print_profiles(result["profiles"])
    return result


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as scratch:
        model = make_model(options.model, Path(scratch))
        dtype = choose_dtype(options.dtype, model)
        result: dict[str, Any] = {
            "model": options.model,
            "dtype": dtype,
            "rounds": options.rounds,
            "prompt_tokens": PREFILL if options.prefill else PROMPT,
            "counts_prefill": options.prefill,
        }
        if not options.only_http:
            result |= measure(options, model, dtype)
            if options.model == "mid" and not options.prefill:
                cores = worker_cores(options.threads)
                result["lossless"] = measure_lossless(
                    Path(scratch) / "lossless", dtype, options.rounds, cores
                )
        if options.http or options.only_http:
            from benchmarks.http_clients import measure_http

            result["http"] = measure_http(model, dtype, options.rounds, options.threads)
    output = options.output or RESULTS / "decode.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {output}")


if __name__ == "__main__":
    main()
