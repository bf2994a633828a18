"""What the server stands: hostile requests, clients that leave, crowds, a killed engine, and time.

Starts a server of its own on this machine and sends a bounded load: mutated bodies over every
endpoint, streams whose client leaves, a burst far beyond the seats in a small K/V pool, a soak, and
an engine that is killed under load. After each part nothing of it may be left, and a reference
answer must be what it was. Writes `storm.json` and `storm.md`; fails if anything did not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.engines import ROOT
from benchmarks.storm_parts import (
    Outcome,
    abandoned_streams,
    burst,
    kill,
    mutated_requests,
    soak,
)
from benchmarks.storm_server import SEATS, Stormed, describe_machine, stormed

SHOWN = 5
"""Of what did not hold, so many are printed at once."""


async def timed(part: Callable[[], Awaitable[Outcome]]) -> Outcome:
    began = time.monotonic()
    outcome = await part()
    outcome.seconds = time.monotonic() - began
    verdict = "held" if not outcome.broken else f"did NOT hold ({len(outcome.broken)})"
    print(
        f"{outcome.part}: {outcome.sent} sent in {outcome.seconds:.0f} s, "
        f"{', '.join(f'{n} {what}' for what, n in outcome.told.items())}: {verdict}",
        flush=True,
    )
    for line in outcome.broken[:SHOWN]:
        print(f"  {line[:600]}", flush=True)
    return outcome


async def storm(target: Stormed, args: argparse.Namespace) -> dict[str, Any]:
    """Every part; the last ends the server."""
    outcomes = [
        await timed(lambda: mutated_requests(target, args.mutated, args.seed)),
        await timed(lambda: abandoned_streams(target, args.abandoned, args.seed)),
        await timed(lambda: burst(target, args.burst * SEATS, args.seed)),
    ]
    held: dict[str, Any] = {}
    if args.soak:

        async def soaking() -> Outcome:
            outcome, start, end = await soak(target, 60 * args.soak, args.seed)
            held.update(start=asdict(start), end=asdict(end), minutes=args.soak)
            return outcome

        outcomes.append(await timed(soaking))
    outcomes.append(await timed(lambda: kill(target)))
    return {"machine": describe_machine(), "parts": [o.row() for o in outcomes], "soak": held}


def markdown(result: dict[str, Any]) -> str:
    """The table that `docs/operations.md` shows."""
    lines = ["| part | requests | what came back | held |", "| --- | --- | --- | --- |"]
    for part in result["parts"]:
        told = ", ".join(f"{count} {what}" for what, count in sorted(part["told"].items()))
        held = "yes" if not part["broken"] else f"NO: {len(part['broken'])}"
        lines.append(f"| {part['part']} | {part['sent']} | {told} | {held} |")
    if soaked := result["soak"]:
        lines += [
            "",
            f"| soak, {soaked['minutes']:g} min | memory, MiB | handles | threads | K/V in use |",
            "| --- | --- | --- | --- | --- |",
        ]
        for when in ("start", "end"):
            h = soaked[when]
            lines.append(
                f"| {when} | {h['memory']:.0f} | {h['handles']} | {h['threads']} | {h['kv']:.0%} |"
            )
    machine = result["machine"]
    facts = f"{machine['cpu']}, {machine['cpus']} cores; torch {machine['torch']}; "
    return "\n".join([*lines, "", f"{facts}{machine['seats']} seats."]) + "\n"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--mutated", type=int, default=10_000, help="mutated requests")
    p.add_argument("--abandoned", type=int, default=1_000, help="streams whose client leaves")
    p.add_argument("--burst", type=int, default=20, help="requests at once, in seats")
    p.add_argument("--soak", type=float, default=1.0, metavar="MINUTES", help="0: none")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    return p


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 if anything did not hold."""
    args = parser().parse_args(arguments)
    with stormed() as target:
        result = asyncio.run(storm(target, args))
        if left := target.left_behind():
            result["parts"][-1]["broken"].append(f"files left behind: {left}")
            print(f"files left behind: {left}", flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "storm.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.output / "storm.md").write_text(markdown(result))
    print(f"\n{markdown(result)}")
    return 1 if any(part["broken"] for part in result["parts"]) else 0


if __name__ == "__main__":
    sys.exit(main())
