"""What would N requests do? Replays depth traces through the planner, without a model or a GPU.

python -m ouro_runtime.loop.simulate --requests 2000 --slots 512 --mean-depth 2.5
python -m ouro_runtime.loop.simulate --slots 8 --mean-depth 1.6 --lossless --acceptance 0.98

In `lossless` the depths are those at which tokens are drafted. A threshold sets their mean and the
share that loop T confirms; `usage.depth` tells both of a server.
"""

from __future__ import annotations

import argparse
import math
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from ouro_runtime.loop.planner import StepPlan
from ouro_runtime.loop.rows import Carried, Readout, Work


@dataclass
class Trace:
    """One request: prompt tokens, and the depth of every token it will generate.

    Attributes:
        wrong: in `lossless`, whether the draft of each token is not what loop T says; else None.
    """

    prompt: int
    depths: np.ndarray
    wrong: np.ndarray | None = None
    produced: int = 0
    carried: list[Carried] = field(default_factory=list)

    def work(self, exact: bool) -> Work:
        known = self.prompt + self.produced
        return Work(
            start=0 if self.produced == 0 else known - 1,
            count=self.prompt if self.produced == 0 else 1,
            known=known,
            prompt=self.prompt,
            last=self.prompt - 2 + len(self.depths),
            forced=self.depths,
            exact=exact,
            lossless=self.wrong is not None,
            drafts=self.wrong is not None,
            carried=self.carried,
        )

    def said(self, position: int, final: bool) -> int:
        """What is read out at a position, as a token: the same by a right draft and by loop T."""
        wrong = self.wrong is not None and not final and self.wrong[position - self.prompt + 1]
        return 2 * position + int(wrong)


@dataclass
class Occupancy:
    """What the passes of a simulation did.

    Attributes:
        rows: rows of every pass. tokens: tokens of every step. cells: the sum of all depths, each
            the loop at which a token was first known: passes that the tokens had to wait for.
    """

    rows: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    cells: int = 0


def simulate(traces: list[Trace], slots: int, loops: int, exact: bool = False) -> Occupancy:
    """Run every trace to its end, at most `slots` at a time, first come first served."""
    waiting = deque(traces)
    running: list[Trace] = []
    out = Occupancy()
    while waiting or running:
        while waiting and len(running) < slots:
            running.append(waiting.popleft())
        plan = StepPlan([trace.work(exact) for trace in running], loops)
        for trace in running:
            trace.carried = []
        sampled = 0
        while len(plan.rows) and plan.passes_left:
            out.rows.append(len(plan.rows))
            readout = plan.readout(plan.rows.loop + 1 >= plan.rows.high)
            tokens, finished = read_out(running, plan.rows.pos[readout.rows], readout)
            plan.advance(readout, tokens, finished)
            sampled += int(readout.final.sum())
            out.cells += int(readout.depth[readout.final].sum())
        for _, index, carried in plan.leftovers():
            running[index].carried.append(carried)
        out.tokens.append(sampled)
        running = [trace for trace in running if trace.produced < len(trace.depths)]
    return out


def read_out(
    running: list[Trace], position: np.ndarray, readout: Readout
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [M] int64 of what is read out at `position` [M], and whether its request ends."""
    tokens, finished = np.zeros(len(readout), np.int64), np.zeros(len(readout), bool)
    for place, index in enumerate(readout.req.tolist()):
        trace, final = running[index], bool(readout.final[place])
        tokens[place] = trace.said(int(position[place]), final)
        trace.produced += final
        finished[place] = final and trace.produced == len(trace.depths)
    return tokens, finished


def random_depths(rng: np.random.Generator, count: int, mean: float, loops: int) -> np.ndarray:
    """`count` depths in 1..loops whose expectation is `mean` (a shifted binomial)."""
    return 1 + rng.binomial(loops - 1, (mean - 1) / max(1, loops - 1), count)


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--slots", type=int, default=512, help="requests that run at a time")
    parser.add_argument("--tokens", type=int, default=64, help="generated tokens per request")
    parser.add_argument("--prompt", type=int, default=1, help="prompt tokens per request")
    parser.add_argument("--loops", type=int, default=4, help="T")
    parser.add_argument("--mean-depth", type=float, default=2.5)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--exact", action="store_true")
    modes.add_argument("--lossless", action="store_true", help="depths are those of drafts")
    parser.add_argument("--acceptance", type=float, default=1.0, help="share of right drafts")
    parser.add_argument(
        "--row-cost",
        type=float,
        default=0.0,
        help="time of a pass per further row, over that of a pass with one row (default: 0, as "
        "where reading the weights is all that a pass costs)",
    )
    parser.add_argument(
        "--pass-ms",
        type=float,
        help="milliseconds that a pass with one row takes: says tokens and requests a second, too",
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    if not 1 <= args.mean_depth <= args.loops:
        parser.error(f"--mean-depth must be from 1 to {args.loops}")
    for name in ("acceptance", "row_cost"):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name.replace('_', '-')} must be from 0 to 1")
    if args.pass_ms is not None and not 0 < args.pass_ms < math.inf:
        parser.error("--pass-ms must be above 0")
    rng = np.random.default_rng(args.seed)
    traces = [
        Trace(args.prompt, random_depths(rng, args.tokens, args.mean_depth, args.loops))
        for _ in range(args.requests)
    ]
    if args.lossless:
        for trace in traces:
            trace.wrong = rng.random(args.tokens) >= args.acceptance
    out = simulate(traces, args.slots, args.loops, args.exact)
    rows = np.array(out.rows)
    tokens = sum(out.tokens)
    seats = min(args.slots, args.requests)
    lockstep = args.loops * -(-tokens // seats)
    mode = "exact" if args.exact else "lossless" if args.lossless else "skip"
    print(f"requests {args.requests}  slots {args.slots}  T {args.loops}  mode {mode}")
    print(f"tokens {tokens}  steps {len(out.tokens)}  passes {len(rows)}")
    print(f"rows per pass: p20/p50/p80 {np.percentile(rows, [20, 50, 80]).astype(int).tolist()}")
    print(f"pass occupancy {rows.mean() / seats:.1%} of the slots")
    print(f"tokens per pass {tokens / len(rows):.1f}, per step {tokens / len(out.tokens):.1f}")
    print(f"passes a full-depth server needs for the same tokens: {lockstep}")
    bound = args.loops * tokens / out.cells
    print(f"gain in passes {lockstep / len(rows):.2f}x, bound T / mean depth {bound:.2f}x")
    seconds = (1 + args.row_cost * (rows - 1)).sum()
    whole = lockstep * (1 + args.row_cost * (seats - 1))
    print(f"gain in time {whole / seconds:.2f}x, at a row cost of {args.row_cost:g}")
    if args.pass_ms is not None:
        took = seconds * args.pass_ms / 1000
        print(f"tokens a second {tokens / took:.0f}, requests a second {args.requests / took:.1f}")


if __name__ == "__main__":
    main()
