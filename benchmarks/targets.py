"""The load benchmark with each target alone and with both: right answers lost, and p95.

The load and the latency to hold are found as in `load.py`. A server with a target agreement first
learns, under a light load with gaps, until its thresholds rest or the time is up. Each run is a
server of its own; `--runs` makes some of them, and what others left in `targets.json` stays.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks.engines import MINI, ROOT
from benchmarks.http_clients import server
from benchmarks.load import OVERLOAD, PATIENCE, SHARE, calibrate, closed_loop_once, look, run
from benchmarks.load_client import Question, open_loop, questions
from ouro_server.presets import SHIPPED, PresetBook

RUNS = ("none", "latency", "agreement", "both")
LEARNT = ("standard", "batch")
"""Classes that the light load asks for, evenly; premium's floor is near full depth anyway."""
STEERED = ("priority_classes", "controller", "audit", "agreement", "gave_way")
"""What is kept of `GET /v1/depth` at the end of a run."""
BURST = 400
"""Questions between two looks whether learning is over."""


def options_of(name: str, told: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """A run's server."""
    options = ["--stream-interval", str(args.interval)]
    if name in ("latency", "both"):
        options += ["--target-tpot-ms", str(told["target_tpot_ms"])]
    if name in ("agreement", "both"):
        options += ["--target-agreement", str(args.agreement), "--audit", str(args.audit)]
    return options


def light(count: int, tok: Tokenizer, seed: int, families: list[str]) -> list[Question]:
    """Questions of the classes that are to be learnt."""
    drawn = questions(count, tok, seed, families)
    return [replace(q, priority_class=LEARNT[i % 2]) for i, q in enumerate(drawn)]


async def learn(address: str, tok: Tokenizer, args: argparse.Namespace) -> dict[str, Any]:
    """Ask lightly until the time is up; what is proven then, and how long it took."""
    model, began, turn = (await look(address))["model"], time.monotonic(), 0
    while time.monotonic() - began < args.learning:
        turn += 1
        asked = light(BURST, tok, 1000 + turn, args.families)
        await open_loop(address, model, asked, args.learning_rate, turn, PATIENCE)
        classes = (await look(address))["agreement"]["priority_classes"]
        print(f"{time.monotonic() - began:.0f} s: {json.dumps(classes)}", flush=True)
    return {"seconds": round(time.monotonic() - began), "classes": classes}


def measure(told: dict[str, Any], args: argparse.Namespace, keep: Any) -> None:
    """The runs asked for, into `told`; `keep` is called after each."""
    tok = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    loops = json.loads((args.model / "config.json").read_text())["total_ut_steps"]
    floors = dict(PresetBook.load(SHIPPED, loops).floors)
    few = questions(args.calibration, tok, args.seed + 1, args.families)
    for name in args.runs:
        if name != "none" and "target_tpot_ms" not in told:
            raise SystemExit("run none first: it says what the load and the target are")
        options = options_of(name, told, args)
        with server(args.model, "float32", *options, seats=args.seats) as (address, _):
            made: dict[str, Any] = {}
            if name == "none":
                found = asyncio.run(calibrate(address, few, args.seats, floors))
                told["calibration"] = found
                full = found["full"]
                told["rate"] = args.rate or OVERLOAD * full["requests_per_second"]
                told["target_tpot_ms"] = args.target or round(SHARE * full["tpot_p95_ms"], 1)
            if name in ("agreement", "both"):
                made["learnt"] = asyncio.run(learn(address, tok, args))
            if name != "none":
                asyncio.run(closed_loop_once(address, few, args.seats))
            asked = questions(int(told["rate"] * args.seconds), tok, args.seed, args.families)
            made |= asyncio.run(run(address, asked, told["rate"], args.seed, name != "none"))
            told_at_end = asyncio.run(look(address))
            made["depth"] = {part: told_at_end[part] for part in STEERED}
        told.setdefault("runs", {})[name] = made
        keep()
        print(name, json.dumps(made["settled"]), flush=True)


def page(told: dict[str, Any]) -> str:
    """The figures as a page."""
    rows = []
    base = told["runs"]["none"]["settled"]["right_percent"]
    for name, made in told["runs"].items():
        s = made["settled"]
        shown = (name, s["tpot_p95_ms"], s["first_token_p95_ms"], s["mean_depth"])
        right = s["right_percent"]
        cells = [shown[0], *(f"{v:.1f}" for v in shown[1:3]), f"{shown[3]:.2f}"]
        rows.append([*cells, f"{right:.1f}", f"{base - right:+.1f}"])
    head = ["targets", "p95, ms", "first token p95, ms", "mean depth", "right, %", "lost, points"]
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n\n".join(["# Targets", told["facts"], "\n".join(lines)]) + "\n"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--model", type=Path, default=MINI)
    p.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    p.add_argument("--seconds", type=float, default=60.0, help="of load, in each run")
    p.add_argument("--families", nargs="+", default=["mod"])
    p.add_argument("--seats", type=int, default=64)
    p.add_argument("--interval", type=int, default=8)
    p.add_argument("--calibration", type=int, default=600)
    p.add_argument("--rate", type=float, help="requests per second; default: calibrated")
    p.add_argument("--target", type=float, help="milliseconds per token; default: calibrated")
    p.add_argument("--agreement", type=float, default=0.98)
    p.add_argument("--audit", type=float, default=0.2)
    p.add_argument("--learning", type=float, default=300.0, help="seconds")
    p.add_argument("--learning-rate", type=float, default=75.0, help="requests per second")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    args = p.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "targets.json"
    told = json.loads(file.read_text()) if file.exists() and "none" not in args.runs else {}

    def keep() -> None:
        told["facts"] = (
            f"{args.model.name}, float32, {platform.machine()} CPU, {os.cpu_count()} cores; the "
            f"load is {told['rate']:.1f} requests per second for {args.seconds:g} s, the targets "
            f"{told['target_tpot_ms']:g} ms (p95) and {args.agreement:g} of answers, --audit "
            f"{args.audit:g}; learnt for {args.learning:g} s at {args.learning_rate:g} requests "
            "per second. Requests from second 10 on."
        )
        file.write_text(json.dumps(told, indent=1) + "\n")
        (args.output / "targets.md").write_text(page(told))

    measure(told, args, keep)
    print(page(told))


if __name__ == "__main__":
    main()
