"""What would N requests do? Replays depth traces through the planner, without a model or a GPU.

python -m ouro_runtime.loop.simulate --requests 2000 --slots 512 --mean-depth 2.5
"""

from __future__ import annotations

import argparse
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from ouro_runtime.loop.planner import StepPlan
from ouro_runtime.loop.rows import Carried, Work


@dataclass
class Trace:
    """One request: prompt tokens, and the depth of every token it will generate."""

    prompt: int
    depths: np.ndarray
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
            carried=self.carried,
        )


@dataclass
class Occupancy:
    """What the passes of a simulation did.

    Attributes:
        rows: rows of every pass. tokens: tokens of every step. cells: cells that decoding needs,
            the sum of all depths (prompts and exact's deeper loops left out).
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
            sampled += len(readout)
            out.cells += int(readout.depth.sum())
            finished = np.zeros(len(readout), bool)
            for place, index in enumerate(readout.req.tolist()):
                trace = running[index]
                trace.produced += 1
                finished[place] = trace.produced == len(trace.depths)
            plan.advance(readout, np.zeros(len(readout), np.int64), finished)
        for _, index, carried in plan.leftovers():
            running[index].carried.append(carried)
        out.tokens.append(sampled)
        running = [trace for trace in running if trace.produced < len(trace.depths)]
    return out


def random_depths(rng: np.random.Generator, count: int, mean: float, loops: int) -> np.ndarray:
    """`count` depths in 1..loops whose expectation is `mean` (a shifted binomial)."""
    return 1 + rng.binomial(loops - 1, (mean - 1) / max(1, loops - 1), count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--slots", type=int, default=512, help="requests that run at a time")
    parser.add_argument("--tokens", type=int, default=64, help="generated tokens per request")
    parser.add_argument("--prompt", type=int, default=1, help="prompt tokens per request")
    parser.add_argument("--loops", type=int, default=4, help="T")
    parser.add_argument("--mean-depth", type=float, default=2.5)
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not 1 <= args.mean_depth <= args.loops:
        parser.error(f"--mean-depth must be from 1 to {args.loops}")
    rng = np.random.default_rng(args.seed)
    traces = [
        Trace(args.prompt, random_depths(rng, args.tokens, args.mean_depth, args.loops))
        for _ in range(args.requests)
    ]
    out = simulate(traces, args.slots, args.loops, args.exact)
    rows = np.array(out.rows)
    tokens = sum(out.tokens)
    lockstep = args.loops * -(-tokens // args.slots)
    print(f"requests {args.requests}  slots {args.slots}  T {args.loops}  exact {args.exact}")
    print(f"tokens {tokens}  steps {len(out.tokens)}  passes {len(rows)}")
    print(f"rows per pass: p20/p50/p80 {np.percentile(rows, [20, 50, 80]).astype(int).tolist()}")
    print(f"pass occupancy {rows.mean() / args.slots:.1%} of the slots")
    print(f"tokens per pass {tokens / len(rows):.1f}, per step {tokens / len(out.tokens):.1f}")
    print(f"passes a full-depth server needs for the same tokens: {lockstep}")
    bound = args.loops * tokens / out.cells
    print(f"gain {lockstep / len(rows):.2f}x, bound T / mean depth {bound:.2f}x")


if __name__ == "__main__":
    main()
