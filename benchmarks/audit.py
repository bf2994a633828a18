"""What audits cost in throughput: two servers that differ in `--audit` alone take turns.

Clients ask in closed loops, greedily and at one threshold, so that every answer skips; the server
that is not asked is stopped (SIGSTOP), since an idle engine polls. Writes `audit.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer

from benchmarks.engines import MINI, ROOT
from benchmarks.http_clients import server
from benchmarks.load import look
from benchmarks.load_client import CLASSES, Question, closed_loop, questions

COUNTERS = {
    "audited": "ouro_audited_requests_total",
    "agreeing": "ouro_agreeing_requests_total",
    "unaudited": "ouro_unaudited_requests_total",
}


def counts(address: str) -> dict[str, float]:
    """What a server says of its audits."""
    text = httpx.get(f"{address}/metrics").text
    samples = [s for f in text_string_to_metric_families(text) for s in f.samples]
    return {k: sum(s.value for s in samples if s.name == n) for k, n in COUNTERS.items()}


def ask(address: str, model: str, asked: Sequence[Question], args: argparse.Namespace) -> float:
    """Requests per second of one round."""
    thresholds = dict.fromkeys(CLASSES, args.threshold)
    answers = asyncio.run(closed_loop(address, model, asked, args.clients, thresholds))
    assert all(answer.error is None for answer in answers), answers
    return len(answers) / max(answer.last for answer in answers)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Rounds of both servers, in turns that alternate who goes first."""
    tok = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    options = {"without": (), "with": ("--audit", str(args.share))}
    rates: dict[str, list[float]] = {name: [] for name in options}
    with ExitStack() as stack:
        servers = {}
        for name, extra in options.items():
            started = server(
                args.model, "float32", "--stream-interval", "8", *extra, seats=args.seats
            )
            servers[name] = stack.enter_context(started)
            model = asyncio.run(look(servers[name][0]))["model"]
            os.killpg(servers[name][1], signal.SIGSTOP)
        for turn in range(-1, args.rounds):
            asked = questions(args.requests, tok, args.seed + turn, args.families)
            for name in sorted(servers, reverse=turn % 2 == 0):
                address, group = servers[name]
                os.killpg(group, signal.SIGCONT)
                rate = ask(address, model, asked, args)
                time.sleep(args.pause)
                if turn >= 0:
                    rates[name].append(rate)
                    print(f"{turn} {name}: {rate:.1f} requests/s", flush=True)
                if turn == args.rounds - 1 and name == "with":
                    told = counts(address)
                os.killpg(group, signal.SIGSTOP)
    kept = [b / a for a, b in zip(rates["without"], rates["with"], strict=True)]
    return {
        "facts": f"{args.model.name}, float32, {platform.machine()} CPU, {os.cpu_count()} cores; "
        f"{args.clients} clients, {args.seats} seats, threshold {args.threshold:g}, "
        f"{args.requests} requests a round, {args.rounds} rounds, --audit {args.share:g}",
        "kept_median": statistics.median(kept),
        "requests_per_second": {name: statistics.median(r) for name, r in rates.items()},
        "audits": told,
        "rounds": rates,
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--model", type=Path, default=MINI)
    p.add_argument("--families", nargs="+", default=["mod"])
    p.add_argument("--share", type=float, default=0.02, help="of answers that are audited")
    p.add_argument("--threshold", type=float, default=0.5)
    p.add_argument("--clients", type=int, default=32)
    p.add_argument("--seats", type=int, default=64)
    p.add_argument("--requests", type=int, default=1500, help="a round")
    p.add_argument("--rounds", type=int, default=8)
    p.add_argument("--pause", type=float, default=0.2, help="seconds after a round, for audits")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    args = p.parse_args()
    result = measure(args)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "audit.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "rounds"}, indent=1))


if __name__ == "__main__":
    main()
