"""The latency controller under a load that full depth cannot hold, and what it costs in answers.

First it is measured how many requests per second the server answers when every token runs every
loop, and at which time per token: the load is a tenth more than that, the target a quarter more.
Then the same questions arrive at the same moments twice, without and with `--target-tpot-ms`.
Latency and right answers come from the same run. Writes `load.json` and `load.md`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks.engines import MINI, ROOT
from benchmarks.http_clients import server
from benchmarks.load_client import CLASSES, Question, closed_loop, open_loop, questions, session
from benchmarks.load_report import by_class, figures, markdown
from ouro_runtime.training.tasks import FAMILIES
from ouro_server.presets import SHIPPED, PresetBook

FULL = dict.fromkeys(CLASSES, 1.0)
OVERLOAD = 1.1
"""The load, in parts of what full depth can hold."""
SHARE = 1.25
"""The target, in parts of the p95 of a saturated server at full depth."""
PATIENCE = 120.0
"""Seconds a client waits for its answer."""
SETTLING = 10.0
"""Seconds at the start of the load that the settled figures leave out."""


async def look(address: str) -> dict[str, Any]:
    """What `GET /v1/depth` says."""
    async with session(address, 10) as http, http.get("/v1/depth") as answer:
        return await answer.json()


async def watch(address: str, began: float, trace: list[dict[str, Any]]) -> None:
    """Note the controller's state every second, until cancelled."""
    while True:
        told = await look(address)
        classes = told["priority_classes"]
        trace.append(
            {
                "seconds": round(time.perf_counter() - began, 1),
                "p95_ms": told["controller"]["p95_tpot_ms"],
                "pressure": told["controller"]["pressure"],
                "thresholds": {name: classes[name]["exit_threshold"] for name in CLASSES},
            }
        )
        await asyncio.sleep(1)


async def calibrate(
    address: str, asked: Sequence[Question], seats: int, floors: dict[str, float]
) -> dict[str, dict[str, Any]]:
    """An idle server, a saturated one at full depth, and a saturated one at the floors."""
    model = (await look(address))["model"]
    await closed_loop(address, model, asked, seats, FULL)  # warms up
    out = {}
    for name, clients, thresholds, part in (
        ("idle", 1, FULL, asked[: len(asked) // 8]),
        ("full", seats, FULL, asked),
        ("floors", seats, floors, asked),
    ):
        answers = await closed_loop(address, model, part, clients, thresholds)
        rate = len(answers) / max(a.last for a in answers)
        out[name] = figures(answers) | {"requests_per_second": rate}
    return out


async def run(
    address: str, asked: Sequence[Question], rate: float, seed: int, steered: bool
) -> dict[str, Any]:
    """The load itself."""
    model = (await look(address))["model"]
    trace: list[dict[str, Any]] = []
    watching = asyncio.create_task(watch(address, time.perf_counter(), trace)) if steered else None
    answers = await open_loop(address, model, asked, rate, seed, PATIENCE)
    if watching is not None:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
    return {
        "whole": figures(answers),
        "settled": figures(answers, SETTLING),
        "settled_by_class": by_class(answers, SETTLING),
        "trace": trace,
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All of it: calibration and both runs."""
    tok = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    loops = json.loads((args.model / "config.json").read_text())["total_ut_steps"]
    floors = dict(PresetBook.load(SHIPPED, loops).floors)
    options = ["--stream-interval", str(args.interval)]
    began = time.monotonic()
    with server(args.model, "float32", *options, seats=args.seats) as (address, _):
        few = questions(args.calibration, tok, args.seed + 1, args.families)
        calibration = asyncio.run(calibrate(address, few, args.seats, floors))
        full = calibration["full"]
        rate = args.rate or OVERLOAD * full["requests_per_second"]
        target = args.target or round(SHARE * full["tpot_p95_ms"], 1)
        asked = questions(int(rate * args.seconds), tok, args.seed, args.families)
        print(f"{rate:.1f} requests/s, target {target:g} ms; {json.dumps(calibration)}", flush=True)
        runs = {"off": asyncio.run(run(address, asked, rate, args.seed, steered=False))}
    options += ["--target-tpot-ms", str(target)]
    with server(args.model, "float32", *options, seats=args.seats) as (address, _):
        asyncio.run(closed_loop_once(address, few, args.seats))
        runs["on"] = asyncio.run(run(address, asked, rate, args.seed, steered=True))
    return {
        "facts": f"{args.model.name}, float32, {platform.machine()} CPU, {os.cpu_count()} cores "
        f"shared by engine, API process and clients; at most {args.seats} requests at once, "
        f"{args.interval} token(s) per stream event. Seed {args.seed}, "
        f"{(time.monotonic() - began) / 60:.0f} minutes.",
        "calibration": calibration,
        "load": {
            "rate": rate,
            "seconds": args.seconds,
            "settling": SETTLING,
            "every": max(1, int(args.seconds) // 20),
            "shares": CLASSES,
        },
        "target_tpot_ms": target,
        "runs": runs,
    }


async def closed_loop_once(address: str, asked: Sequence[Question], clients: int) -> None:
    """Warm a server up, at a depth the controller does not touch."""
    await closed_loop(address, (await look(address))["model"], asked, clients, FULL)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--model", type=Path, default=MINI)
    p.add_argument("--seconds", type=float, default=60.0, help="of load, in each run")
    p.add_argument("--families", nargs="+", choices=FAMILIES, default=["mod"])
    p.add_argument("--seats", type=int, default=64, help="requests the engine runs at once")
    p.add_argument("--interval", type=int, default=8, help="tokens per stream event")
    p.add_argument("--calibration", type=int, default=600, help="requests per calibration")
    p.add_argument("--rate", type=float, help="requests per second; default: calibrated")
    p.add_argument("--target", type=float, help="milliseconds per token; default: calibrated")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    args = p.parse_args()
    result = measure(args)
    text = markdown(result)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "load.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.output / "load.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
