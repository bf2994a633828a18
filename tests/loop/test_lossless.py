"""Drafts without a model: states are hashes of all that attention reads, so that one cell too old,
too new or missing shows in the next read-out."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from ouro_runtime.loop.drafts import DraftRule
from ouro_runtime.loop.executor import StepExecutor
from ouro_runtime.loop.planner import StepPlan
from ouro_runtime.loop.rows import Carried, Left, Rows, Segments, Work

VOCAB, END = 12, 0


def digest(*parts: Any) -> int:
    return hash(parts) & ((1 << 60) - 1)


@cache
def states(tokens: tuple[int, ...], loops: int) -> tuple[tuple[int, ...], ...]:
    """By position, what enters its first loop and what each of its loops leaves."""
    if not tokens:
        return ()
    before = states(tokens[:-1], loops)
    state = [digest(tokens[-1])]
    for loop in range(loops):
        state.append(digest(state[-1], *(other[loop] for other in before), state[loop]))
    return (*before, tuple(state))


def answer(tokens: tuple[int, ...]) -> int:
    """The token that full depth puts after `tokens`."""
    return digest(VOCAB, tokens) % VOCAB


class Asking:
    """A lossless request, as an engine keeps it."""

    def __init__(self, rng: np.random.Generator, loops: int, seat: int) -> None:
        self.prompt = int(rng.integers(1, 7))
        self.text = [int(token) for token in rng.integers(1, VOCAB, self.prompt)]
        self.most = 2 * (loops - 1)
        self.last = self.prompt - 2 + int(rng.integers(1, 16))
        self.luck, self.seat, self.computed = float(rng.choice([0, 0.3, 0.8, 1])), seat, 0
        self.single, self.guided = rng.random() < 0.15, rng.random() < 0.3
        low, high = sorted(int(loop) for loop in rng.integers(1, loops + 1, 2))
        # By any exit rule; what a loop changed of a hash is around 1.
        self.controls: dict[str, Any] = {
            str(rng.choice(["threshold", "margin", "delta"])): rng.random()
        }
        self.controls |= {"min_loops": low, "max_loops": high}
        if rng.random() < 0.5:
            self.controls["forced"] = rng.integers(1, loops + 1, int(rng.integers(1, 5)))
        self.ended, self.preempted, self.reserved = False, False, 0
        self.carried: list[Carried] = []
        self.cells = self.drafts = self.billed = self.noted = 0

    def work(self, budget: int, drafts: bool) -> Work:
        known = len(self.text)
        count = min(known - self.computed, budget)
        self.reserved = self.computed + count - 1 + self.most
        return Work(
            start=self.computed,
            count=count,
            known=known,
            prompt=self.prompt,
            last=self.last,
            lossless=True,
            drafts=drafts or not self.guided,
            guided=self.guided,
            seat=self.seat,
            single=self.single,
            carried=self.carried,
            **self.controls,
        )

    def bounds(self, token: int) -> tuple[int, int]:
        """Least and most loops of the draft of the answer's token number `token`."""
        if "forced" in self.controls:
            return (self.controls["forced"][token % len(self.controls["forced"])],) * 2
        return self.controls["min_loops"], self.controls["max_loops"]

    def take(self, token: int) -> bool:
        self.text.append(token)
        self.ended = token == END or len(self.text) == self.last + 2
        return token == END


class Watched(DraftRule):
    """Hears of the drafts that it asked for and of no others, and is not asked in vain."""

    def __init__(self, loops: int, asking: list[Asking]) -> None:
        super().__init__(loops)
        self.asking, self.allowed = asking, True
        self.chosen: set[tuple[int, int, float]] = set()

    def drafts(self, seat: np.ndarray, depth: np.ndarray, cdf: np.ndarray) -> np.ndarray:
        requests = [self.asking[index] for index in seat]
        assert self.allowed and all(r.guided and not r.single for r in requests)
        drafts = super().drafts(seat, depth, cdf)
        self.chosen |= set(
            zip(*(part[drafts].tolist() for part in (seat, depth, cdf)), strict=True)
        )
        return drafts

    def learn(
        self, seat: np.ndarray, depth: np.ndarray, cdf: np.ndarray, right: np.ndarray
    ) -> None:
        told = zip(seat.tolist(), depth.tolist(), cdf.tolist(), strict=True)
        assert self.chosen.issuperset(told), "it did not ask for this draft"
        super().learn(seat, depth, cdf, right)


class Hashing:
    """Runs passes over the hashes of the requests of a step, and checks what is read out."""

    def __init__(self, asking: list[Asking], loops: int, rng: np.random.Generator) -> None:
        self.asking, self.loops, self.rng = asking, loops, rng
        self.cells: list[dict[tuple[int, int], int]] = [{} for _ in asking]
        self.written: list[dict[int, int]] = [{} for _ in asking]
        self.active: list[int] = []

    def prepare(self, rows: Rows, segments: Segments) -> None: ...

    def run_pass(self, hidden: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        states, left = hidden[:, 0].tolist(), []
        places = list(zip(rows.req.tolist(), rows.pos.tolist(), rows.loop.tolist(), strict=True))
        assert len(set(places)) == len(places), "a cell runs twice in a pass"
        for row, (req, pos, loop) in enumerate(places):
            request = self.asking[self.active[req]]
            assert pos <= min(request.last, request.reserved), "no slot is reserved for it"
            request.cells += pos >= request.prompt - 1
            if loop == 0:
                assert states[row] != END, "nothing follows the end"
                assert rows.survival[row] == 1
                self.written[self.active[req]][pos] = states[row]
                states[row] = digest(states[row])
            self.cells[self.active[req]][pos, loop] = states[row]
        for (req, pos, loop), state in zip(places, states, strict=True):
            read = [self.cells[self.active[req]][other, loop] for other in range(pos + 1)]
            left.append([digest(state, *read), pos, loop + 1])
        return torch.tensor(left), torch.from_numpy(self.rng.random(len(rows), np.float32))

    def embed(self, tokens: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.stack([tokens, *[np.zeros_like(tokens)] * 2], axis=1))

    def read_out(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def _texts(self, req: np.ndarray, logits: torch.Tensor) -> list[tuple[Asking, int, tuple]]:
        """Requests, loops, and the texts that they are read out after."""
        found = []
        for place, (state, pos, loop) in zip(req.tolist(), logits.tolist(), strict=True):
            index = self.active[place]
            text = tuple(self.written[index][at] for at in range(pos + 1))
            confirmed = tuple(self.asking[index].text)
            assert text[: len(confirmed)] == confirmed[: len(text)], "it goes on from what is void"
            assert state == states(text, self.loops)[-1][loop], "it read another cell"
            found.append((self.asking[index], loop, text))
        return found

    def sample(self, req: np.ndarray, logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        tokens, ends = [], []
        for request, loop, text in self._texts(req, logits):
            assert loop == self.loops and list(text) == request.text, "read out too soon"
            tokens.append(answer(text))
            ends.append(request.take(tokens[-1]))
        return np.array(tokens), np.array(ends)

    def draft(self, req: np.ndarray, logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        tokens = []
        for request, loop, text in self._texts(req, logits):
            assert not request.single and not request.ended and len(text) <= request.last
            low, high = request.bounds(len(text) - request.prompt)
            assert low <= loop <= high, "drafted where nobody asked for it"
            request.drafts += 1
            right = digest(text, loop) % 1000 < 1000 * request.luck
            tokens.append((answer(text) + (not right)) % VOCAB)
        return np.array(tokens), np.array(tokens) == END

    def stand_in(self, left: Left) -> None:
        raise AssertionError("a lossless position owes no loops")

    def step(self, executor: StepExecutor, chosen: list[int], budget: int, drafts: bool) -> None:
        self.active = chosen
        asking = [self.asking[index] for index in chosen]
        work = [request.work(budget, drafts) for request in asking]
        scheduled = [r.text[w.start : w.start + w.count] for r, w in zip(asking, work, strict=True)]
        embedded = self.embed(np.concatenate(scheduled))
        result = executor.run(StepPlan(work, self.loops), embedded, self)
        for place, state in result.deferred.items():
            self.sample(np.array([place]), state[None])
        read: list[int] = [w.known for w in work]
        for out in result.readouts:
            for place in np.nonzero(out.final)[0]:
                index, drafted = out.req[place], int(out.drafted[place])
                request = asking[index]
                known_early = drafted > 0 and out.draft[place] == request.text[read[index]]
                assert out.depth[place] == (drafted if known_early else self.loops)
                request.billed += int(out.loops_run[place])
                request.noted += int((drafted > 0) + out.dropped[place])
                read[index] += 1
        for place, request in enumerate(asking):
            request.computed += work[place].count + len(request.text) - work[place].known
            request.computed -= work[place].start + work[place].count == work[place].known
            request.carried = result.carried[place]


def run(seed: int, loops: int) -> list[Asking]:
    """Some requests, with chunks, steps without them, and preemptions."""
    rng = np.random.default_rng(seed)
    asking = [Asking(rng, loops, seat) for seat in range(int(rng.integers(1, 6)))]
    world, rule = Hashing(asking, loops, rng), Watched(loops, asking)
    executor = StepExecutor(loops, rule)
    for request in asking:
        rule.open(request.seat)
    for _ in range(400):
        waiting = [index for index, request in enumerate(asking) if not request.ended]
        if not waiting:
            return asking
        for index in waiting:
            if rng.random() < 0.05:
                request = asking[index]
                request.carried, request.preempted = [], True
                request.computed = int(rng.integers(0, min(request.computed, request.prompt) + 1))
                request.computed = min(request.computed, len(request.text) - 1)
        chosen = [index for index in waiting if rng.random() < 0.8] or waiting[:1]
        rule.allowed = drafts = rng.random() < 0.8
        world.step(executor, chosen, int(rng.choice([3, 100])), drafts)
    raise AssertionError("requests never ended")


@pytest.mark.parametrize("loops", [1, 2, 4, 6])
def test_answers_are_those_of_every_loop_and_all_that_ran_is_billed(loops: int) -> None:
    drafts = 0
    for seed in range(25):
        for request in run(seed, loops):
            drafts += request.drafts
            text = request.text[: request.prompt]
            while len(text) < request.last + 2 and END not in text:
                text.append(answer(tuple(text)))
            assert request.text == text, seed
            assert not any(carried.next for carried in request.carried), seed
            if not request.preempted:
                assert (request.billed, request.noted) == (request.cells, request.drafts), seed
    assert bool(drafts) == (loops > 1)


def test_right_drafts_save_passes() -> None:
    """At loop 1, all of them: a token a pass, from the second step on."""
    request = Asking(np.random.default_rng(0), 4, 0)
    request.luck, request.last, request.single, request.guided = 1.0, 40, False, False
    request.controls = {"threshold": 0.0, "min_loops": 1, "max_loops": 4}
    world, executor, gained = Hashing([request], 4, np.random.default_rng(0)), StepExecutor(4), []
    while not request.ended:
        before = len(request.text)
        world.step(executor, [0], 100, True)
        gained.append(len(request.text) - before)
    assert gained[0] == 1 and set(gained[1:-1]) <= {4}, gained
