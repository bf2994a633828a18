"""Runs the passes of one engine step: the same loop for every runner.

The executor owns hidden states and survival; where rows go is the planner's business, how a pass
is computed and a token is sampled the runner's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from ouro_runtime.exit.gate import survive
from ouro_runtime.exit.policy import delta_fires, exit_mask, gate_fires, margin_fires
from ouro_runtime.exit.readings import change, margin
from ouro_runtime.loop.drafts import DraftRule
from ouro_runtime.loop.planner import StepPlan
from ouro_runtime.loop.rows import HEAD, NOBODY, NONE, Carried, Left, Move, Readout, Rows, Segments


class PassRunner(Protocol):
    """What the executor needs of an engine."""

    def prepare(self, rows: Rows, segments: Segments) -> None:
        """Point attention at the cells of the next pass and the stand-ins that they will read."""

    def run_pass(self, hidden: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """One application of the block, which fills the stand-ins that it reads.

        Returns:
            Normed states [N, H], lambda [N] float32.
        """

    def embed(self, tokens: np.ndarray) -> torch.Tensor:
        """Embeddings [M, H] of token ids [M] int64."""

    def read_out(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [M, vocab] of states [M, H]."""

    def sample(self, req: np.ndarray, logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Sample logits [M, vocab] of requests [M]: tokens [M], finished [M] bool."""

    def draft(self, req: np.ndarray, logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """What `sample` would say there, as far as the tokens drafted so far are right."""

    def stand_in(self, left: Left) -> None:
        """From now on the K/V of positions at their last loop stands for their deeper ones."""


@dataclass
class StepResult:
    """What a step's passes brought.

    Attributes:
        readouts: what was read out after each pass that read out anything.
        deferred: request -> normed state [H] read out but not sampled yet.
        carried: per request, rows to be carried over.
        hidden: [scheduled, H] normed states at loop T of the scheduled prompt positions (other
            entries are unspecified); None if nobody asked.
        pass_rows: rows of each pass. rows_by_loop: cells run at each loop, [T].
    """

    carried: list[list[Carried]]
    readouts: list[Readout] = field(default_factory=list)
    deferred: dict[int, torch.Tensor] = field(default_factory=dict)
    hidden: torch.Tensor | None = None
    pass_rows: list[int] = field(default_factory=list)
    rows_by_loop: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


def _pick(states: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
    """Rows of `states`, by a lighter way than indexing."""
    return states.index_select(0, torch.from_numpy(rows))


class _LastStates:
    """States [scheduled, H] at loop T of a step's prompt positions, gathered as they finish."""

    def __init__(self, plan: StepPlan, embedded: torch.Tensor) -> None:
        self.hidden = torch.zeros_like(embedded)
        self._source = np.arange(len(plan.rows))
        self._source[plan.scheduled :] = -1

    def follow(self, move: Move, hidden: torch.Tensor) -> None:
        """Take the states of the rows that are done, then move with the others."""
        done = move.done[self._source[move.done] >= 0]
        self.hidden[torch.from_numpy(self._source[done])] = _pick(hidden, done)
        self._source[move.reuse_rows] = -1
        if move.keep is not None:
            self._source = self._source[move.keep]
        self._source = np.concatenate([self._source, np.full(len(move.append), -1)])


class StepExecutor:
    """Runs steps of a model of T loops.

    Args:
        loops: T. rule: where to draft tokens of lossless requests that are `guided`.
    """

    def __init__(self, loops: int, rule: DraftRule | None = None) -> None:
        self.loops = loops
        self.rule = rule or DraftRule(loops)

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
        result = StepResult(
            carried=[[] for _ in plan.work], rows_by_loop=np.zeros(self.loops, np.int64)
        )
        hidden = self._restore(plan, embedded, runner)
        kept = _LastStates(plan, embedded) if keep_hidden else None
        while len(plan.rows) and plan.passes_left:
            rows = plan.rows
            result.pass_rows.append(len(rows))
            result.rows_by_loop += np.bincount(rows.loop, minlength=self.loops)
            runner.prepare(rows, plan.segments())
            moved = plan.undecided(plan.delta > 0.0, least=2) if plan.compares else NONE
            before = _pick(hidden, moved) if len(moved) else hidden
            hidden, halt = runner.run_pass(hidden, rows)
            rows.survival = survive(rows.survival, halt.numpy())
            fires = gate_fires(rows.survival, plan.threshold[rows.req])
            if len(moved):
                changes = change(before, _pick(hidden, moved))
                fires[moved] = delta_fires(changes, plan.delta[rows.req[moved]])
            if plan.reads_out:
                self._read_margins(plan, hidden, runner, fires)
            out = plan.readout(self._exits(plan, fires))
            tokens, finished = self._read_out(plan, out, hidden, runner, result)
            if plan.drafting:
                self._learn(plan, out, tokens)
            move = plan.advance(out, tokens, finished)
            if len(move.left):
                runner.stand_in(move.left)
            if kept is not None:
                kept.follow(move, hidden)
            hidden = self._follow(hidden, move, tokens, runner)
        left = plan.leftovers()
        if left:
            states = _pick(hidden, np.array([row for row, _, _ in left])).unbind()
            for (_, request, carried), state in zip(left, states, strict=True):
                carried.hidden = state
                result.carried[request].append(carried)
        if kept is not None:
            result.hidden = kept.hidden
        return result

    def _restore(self, plan: StepPlan, embedded: torch.Tensor, runner: PassRunner) -> torch.Tensor:
        """Initial states [N, H]: embeddings, with carried states in their places."""
        if not plan.restore:
            return embedded
        hidden = embedded.new_empty(len(plan.rows), embedded.shape[1])
        hidden[: plan.scheduled] = embedded
        if len(plan.born):
            hidden[len(hidden) - len(plan.born) :] = runner.embed(plan.born)
        index = torch.from_numpy(np.array([row for row, _ in plan.restore]))
        states = torch.stack([carried.hidden for _, carried in plan.restore])
        return hidden.index_copy_(0, index, states)

    def _read_margins(
        self, plan: StepPlan, hidden: torch.Tensor, runner: PassRunner, fires: np.ndarray
    ) -> None:
        """Read this loop out for the rows that the rule `margin` decides, and note where it
        fires."""
        read = plan.undecided(plan.margin < 1.0)
        if len(read):
            margins = margin(runner.read_out(_pick(hidden, read)))
            fires[read] = margin_fires(margins, plan.margin[plan.rows.req[read]])

    def _exits(self, plan: StepPlan, fires: np.ndarray) -> np.ndarray:
        """Which rows leave, of [N] bool whose exit rule fires: [N] bool."""
        rows, depth = plan.rows, plan.rows.loop + 1
        exits = exit_mask(fires, depth, rows.low, rows.high, self.loops)
        if not plan.drafting:
            return exits
        guided = plan.guided[rows.req] & (rows.stop == HEAD) & (depth < self.loops)
        exits &= ~guided
        # A rule that tries again now and then is asked only where its answer counts.
        guided &= plan.draftable() & (depth >= rows.low) & (depth <= rows.high)
        asked = np.nonzero(guided)[0]
        if len(asked):
            exits[asked] = self.rule.drafts(
                plan.seat[rows.req[asked]], depth[asked], 1.0 - rows.survival[asked]
            )
        return exits

    def _learn(self, plan: StepPlan, out: Readout, tokens: np.ndarray) -> None:
        """Tell the rule which drafts were right."""
        told = np.nonzero(out.final & (out.drafted > 0) & plan.guided[out.req])[0]
        if not len(told):
            return
        rows, depth = out.rows[told], out.drafted[told]
        cdf = 1.0 - plan.rows.history[rows, depth - 1]
        self.rule.learn(plan.seat[out.req[told]], depth, cdf, out.right(tokens)[told])

    def _read_out(
        self,
        plan: StepPlan,
        out: Readout,
        hidden: torch.Tensor,
        runner: PassRunner,
        result: StepResult,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sample the rows that left; put deferred ones aside. Tokens [M] and finished [M]."""
        if not len(out):
            return NONE, NOBODY
        result.readouts.append(out)
        states = hidden if len(out) == len(hidden) else _pick(hidden, out.rows)
        now = out.final & ~out.deferred
        if now.all():
            return runner.sample(out.req, runner.read_out(states))
        tokens, finished = np.zeros(len(out), np.int64), np.zeros(len(out), bool)
        for index in np.nonzero(out.deferred)[0]:
            result.deferred[int(out.req[index])] = states[index].clone()
        read = np.nonzero(~out.deferred)[0]
        if not len(read):
            return tokens, finished
        logits = runner.read_out(states if len(read) == len(out) else _pick(states, read))
        place = np.cumsum(~out.deferred) - 1
        final = np.nonzero(now)[0]
        if len(final):
            picked = _pick(logits, place[final])
            tokens[final], finished[final] = runner.sample(out.req[final], picked)
        # Only now: a final token may show a draft of the same pass to be in vain.
        drafts = np.nonzero(~out.final & ~plan.void(out, tokens, finished))[0]
        if len(drafts):
            picked = _pick(logits, place[drafts])
            tokens[drafts], finished[drafts] = runner.draft(out.req[drafts], picked)
        return tokens, finished

    def _follow(
        self, hidden: torch.Tensor, move: Move, tokens: np.ndarray, runner: PassRunner
    ) -> torch.Tensor:
        """Move hidden states as the planner moved the rows."""
        if move.nothing:
            return hidden
        reused, appended = len(move.reuse), len(move.append)
        if reused + appended:
            started = np.concatenate([move.reuse, move.append]) if appended else move.reuse
            fresh = runner.embed(tokens[started])
            if reused == len(hidden):
                hidden = fresh[:reused]
            elif reused:
                hidden.index_copy_(0, torch.from_numpy(move.reuse_rows), fresh[:reused])
        if move.keep is not None:
            hidden = _pick(hidden, move.keep)
        if appended:
            hidden = torch.cat([hidden, fresh[reused:]])
        return hidden
