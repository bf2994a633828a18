"""Runs the passes of one engine step: the same loop for every runner.

The executor owns hidden states and survival; where rows go is the planner's business, how a pass
is computed and a token is sampled the runner's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

import numpy as np
import torch

from ouro_runtime.exit.gate import survive
from ouro_runtime.exit.policy import ExitPolicy, ExitSignals, exit_mask
from ouro_runtime.loop.planner import Carried, Move, Readout, Rows, Segments, StepPlan

PARTS = ("block", "metadata", "read_out", "stand_in", "plan")
"""Where the time of a pass goes: the block itself; attention metadata; logits and sampling;
stand-in K/V; planning, exit rule and moving states."""


class PassRunner(Protocol):
    """What the executor needs of an engine."""

    def prepare(self, rows: Rows, segments: Segments) -> None:
        """Point attention at the cells of the next pass."""

    def run_pass(self, hidden: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """One application of the block: [N, H] -> normed states [N, H], lambda [N] float32."""

    def embed(self, tokens: np.ndarray) -> torch.Tensor:
        """Embeddings [M, H] of token ids [M] int64."""

    def sample(self, req: np.ndarray, hidden: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Read out and sample states [M, H] of requests [M]: tokens [M], finished [M] bool."""

    def stand_in(self, req: np.ndarray, pos: np.ndarray, depth: np.ndarray) -> None:
        """From now on the K/V of cells at loop `depth` (1-based) stands for their deeper loops."""

    def settle(self, segments: Segments) -> None:
        """Fill the stand-ins that the cells of the next pass will read."""

    def margin(self, hidden: torch.Tensor) -> torch.Tensor:
        """Top-1 minus top-2 probability [N] of the read-out of states [N, H]."""


@dataclass
class StepResult:
    """What a step's passes brought.

    Attributes:
        depths: per request, the depth of each token read out, in order.
        loops_run: per request, loops executed at the position that each token was read out of.
        exit_cdf: per request and token, CDF(1)..CDF(depth) of the gate, then zeros, [T].
        deferred: request -> normed state [H] read out but not sampled yet.
        carried: per request, rows to be carried over.
        hidden: [scheduled, H] normed states at loop T of the scheduled prompt positions (other
            entries are unspecified); None if nobody asked.
        pass_rows: rows of each pass. rows_by_loop: cells run at each loop, [T].
        seconds: wall time by part of a pass, see `PARTS`.
    """

    depths: list[list[int]]
    loops_run: list[list[int]]
    exit_cdf: list[list[list[float]]]
    deferred: dict[int, torch.Tensor] = field(default_factory=dict)
    carried: list[list[Carried]] = field(default_factory=list)
    hidden: torch.Tensor | None = None
    pass_rows: list[int] = field(default_factory=list)
    rows_by_loop: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))


class _Watch:
    """Adds the time since the last call to a part."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.last = seconds, perf_counter()

    def __call__(self, part: str) -> None:
        now = perf_counter()
        self.seconds[part] += now - self.last
        self.last = now


class StepExecutor:
    """Runs steps of a model of T loops.

    Args:
        loops: T. policy: the exit policy of the model.
    """

    def __init__(self, loops: int, policy: ExitPolicy) -> None:
        self.loops = loops
        self.policy = policy

    def run(
        self,
        plan: StepPlan,
        embedded: torch.Tensor,
        runner: PassRunner,
        keep_hidden: bool = False,
    ) -> StepResult:
        """Run all passes of `plan`.

        Args:
            embedded: [scheduled, H] embeddings of the scheduled positions, in request order.
            keep_hidden: return the last states of the scheduled positions.
        """
        requests = len(plan.work)
        result = StepResult(
            depths=[[] for _ in range(requests)],
            loops_run=[[] for _ in range(requests)],
            exit_cdf=[[] for _ in range(requests)],
            carried=[[] for _ in range(requests)],
            rows_by_loop=np.zeros(self.loops, np.int64),
        )
        lap = _Watch(result.seconds)
        hidden = self._restore(plan, embedded)
        source = np.arange(len(plan.rows))
        source[plan.scheduled :] = -1
        if keep_hidden:
            result.hidden = torch.zeros_like(embedded)
        while len(plan.rows) and plan.passes_left:
            rows = plan.rows
            result.pass_rows.append(len(rows))
            result.rows_by_loop += np.bincount(rows.loop, minlength=self.loops)
            segments = plan.segments()
            lap("plan")
            runner.settle(segments)
            lap("stand_in")
            runner.prepare(rows, segments)
            lap("metadata")
            before = hidden
            hidden, halt = runner.run_pass(hidden, rows)
            lap("block")
            out = plan.readout(self._exits(plan, before, hidden, halt, runner))
            lap("plan")
            tokens, finished = self._read_out(plan, out, hidden, runner, result)
            lap("read_out")
            req, pos, depth = rows.req, rows.pos.copy(), rows.loop.copy()
            move = plan.advance(out, finished)
            lap("plan")
            if len(move.fill):
                runner.stand_in(req[move.fill], pos[move.fill], depth[move.fill])
                lap("stand_in")
            if result.hidden is not None:
                kept = move.done[source[move.done] >= 0]
                result.hidden[torch.from_numpy(source[kept])] = hidden[torch.from_numpy(kept)]
            hidden, source = self._follow(hidden, source, move, tokens, runner)
            lap("plan")
        for row, request, carried in plan.leftovers():
            carried.hidden = hidden[row].clone()
            result.carried[request].append(carried)
        lap("plan")
        return result

    def _restore(self, plan: StepPlan, embedded: torch.Tensor) -> torch.Tensor:
        """Initial states [N, H]: embeddings, with carried states in their places."""
        if not plan.restore:
            return embedded
        hidden = embedded.new_empty(len(plan.rows), embedded.shape[1])
        hidden[: plan.scheduled] = embedded
        index = torch.tensor([row for row, _ in plan.restore])
        hidden[index] = torch.stack([carried.hidden for _, carried in plan.restore])
        return hidden

    def _exits(
        self,
        plan: StepPlan,
        before: torch.Tensor,
        hidden: torch.Tensor,
        halt: torch.Tensor,
        runner: PassRunner,
    ) -> np.ndarray:
        """Update survival and apply the exit rule to every row: [N] bool."""
        rows = plan.rows
        rows.survival = survive(rows.survival, halt.numpy())
        margin = delta = None
        if "margin" in self.policy.needs:
            margin = runner.margin(hidden).numpy()
        if "delta" in self.policy.needs:
            after = hidden.float()
            moved = (after - before.float()).norm(dim=-1) / after.norm(dim=-1)
            delta = np.where(rows.loop == 0, np.float32(np.inf), moved.numpy())
        low, high = plan.limits()
        return exit_mask(
            self.policy.score(ExitSignals(rows.survival, margin, delta)),
            rows.loop + 1,
            plan.threshold[rows.req],
            low,
            high,
            self.loops,
        )

    def _read_out(
        self,
        plan: StepPlan,
        out: Readout,
        hidden: torch.Tensor,
        runner: PassRunner,
        result: StepResult,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sample the rows that left; put deferred ones aside. Tokens [M] and finished [M]."""
        tokens = np.zeros(len(out.rows), np.int64)
        finished = np.zeros(len(out.rows), bool)
        if not len(out.rows):
            return tokens, finished
        states = hidden if len(out.rows) == len(hidden) else hidden[torch.from_numpy(out.rows)]
        full, cdf = plan.runs_every_loop(out), out.cdf.tolist()
        for index, request in enumerate(out.req.tolist()):
            depth = int(out.depth[index])
            result.depths[request].append(depth)
            result.loops_run[request].append(self.loops if full[index] else depth)
            result.exit_cdf[request].append(cdf[index])
        now = ~out.deferred
        if now.all():
            return runner.sample(out.req, states)
        for index in np.nonzero(out.deferred)[0]:
            result.deferred[int(out.req[index])] = states[index].clone()
        if now.any():
            picked = states[torch.from_numpy(np.nonzero(now)[0])]
            tokens[now], finished[now] = runner.sample(out.req[now], picked)
        return tokens, finished

    def _follow(
        self,
        hidden: torch.Tensor,
        source: np.ndarray,
        move: Move,
        tokens: np.ndarray,
        runner: PassRunner,
    ) -> tuple[torch.Tensor, np.ndarray]:
        """Move hidden states as the planner moved the rows."""
        if move.nothing:
            return hidden, source
        started = np.concatenate([move.reuse, move.append])
        if len(started):
            fresh = runner.embed(tokens[started])
            reused = len(move.reuse)
            if reused == len(hidden):
                hidden = fresh[:reused]
            elif reused:
                hidden[torch.from_numpy(move.reuse_rows)] = fresh[:reused]
            source[move.reuse_rows] = -1
        if move.keep is not None:
            hidden, source = hidden[torch.from_numpy(move.keep)], source[move.keep]
        if len(move.append):
            hidden = torch.cat([hidden, fresh[len(move.reuse) :]])
            source = np.concatenate([source, np.full(len(move.append), -1)])
        return hidden, source
