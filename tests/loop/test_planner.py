"""The planner's invariants, on random steps of random requests, without a model."""

import numpy as np
import pytest

from ouro_runtime.loop.planner import StepPlan
from ouro_runtime.loop.rows import HEAD, Work

LOOPS = 4


class Request:
    """A request whose depths are known beforehand, driven step by step."""

    def __init__(self, rng: np.random.Generator, loops: int) -> None:
        self.prompt = int(rng.integers(1, 9))
        self.depths = rng.integers(1, loops + 1, int(rng.integers(1, 12)))
        self.deepest = int(rng.choice([loops, self.depths.max()]))
        self.exact = bool(rng.integers(2))
        self.single = rng.random() < 0.2
        self.computed = 0
        self.produced = 0
        self.carried = []

    @property
    def ended(self) -> bool:
        return self.produced == len(self.depths)

    def work(self, budget: int) -> Work:
        known = self.prompt + self.produced
        count = min(known - self.computed, budget)
        return Work(
            start=self.computed,
            count=count,
            known=known,
            prompt=self.prompt,
            last=self.prompt - 2 + len(self.depths),
            forced=self.depths,
            deepest=self.deepest,
            exact=self.exact,
            single=self.single,
            depths=self.depths[: self.produced].tolist(),
            carried=self.carried,
        )


class Recorder:
    """Runs steps and keeps, per request, the pass at which each cell ran and each fill."""

    def __init__(self, requests: list[Request], loops: int) -> None:
        self.requests, self.loops, self.clock = requests, loops, 0
        self.ran = [{} for _ in requests]
        self.filled = [{} for _ in requests]

    def step(self, chosen: list[int], budget: int) -> None:
        active = [self.requests[i] for i in chosen]
        heads = {}
        plan = StepPlan([r.work(budget) for r in active], self.loops)
        for place, (request, work) in enumerate(zip(active, plan.work, strict=True)):
            heads[place] = work.start + work.count == work.known
            request.carried = []
        before = [r.produced for r in active]
        while len(plan.rows) and plan.passes_left:
            rows = plan.rows
            segments = plan.segments()
            assert segments.first[-1] == len(rows)
            lengths = np.diff(segments.first)
            assert segments.max_query == lengths.max()
            assert np.array_equal(np.repeat(segments.req, lengths), rows.req)
            assert np.array_equal(np.repeat(segments.loop, lengths), rows.loop)
            assert np.array_equal(segments.seq_len - 1, rows.pos[segments.first[1:] - 1])
            for row in range(len(rows)):
                cell = (int(rows.pos[row]), int(rows.loop[row]))
                log = self.ran[chosen[rows.req[row]]]
                assert cell not in log, f"cell {cell} ran twice"
                log[cell] = self.clock
            self.clock += 1
            out = plan.readout(rows.loop + 1 >= rows.high)
            finished = np.zeros(len(out), bool)
            for place, index in enumerate(out.req.tolist()):
                request = active[index]
                assert out.depth[place] == request.depths[request.produced]
                request.produced += 1
                finished[place] = request.ended
            left = plan.advance(out, np.zeros(len(out), np.int64), finished).left
            for index, pos, depth in zip(left.req, left.pos, left.depth, strict=True):
                self.filled[chosen[index]][int(pos)] = int(depth)
        for _, place, carried in plan.leftovers():
            active[place].carried.append(carried)
        for place, request in enumerate(active):
            gained = request.produced - before[place]
            if heads[place]:
                request.computed += plan.work[place].count + gained - 1
                assert gained <= (1 if request.single else self.loops)
            else:
                assert gained == 0
                request.computed += plan.work[place].count

    def check(self, index: int) -> None:
        """Every cell once, below the one above it, after the K/V it reads; stand-ins where due."""
        request, ran = self.requests[index], self.ran[index]
        last = request.prompt + len(request.depths) - 2
        for pos in range(last + 1):
            token = pos - request.prompt + 1
            depth = request.deepest
            if token > 0 and not request.exact:
                depth = int(request.depths[token])
            times = [ran.get((pos, loop)) for loop in range(depth)]
            if request.exact and token > 0:
                known = [t for t in times if t is not None]
                assert len(known) >= request.depths[token] and times[: len(known)] == known
                times = known
            assert None not in times, f"position {pos} misses a loop of {depth}: {times}"
            assert times == sorted(set(times))
            assert (pos, depth) not in ran
            if depth < request.deepest and pos < last:
                assert self.filled[index][pos] == depth
            else:
                assert pos not in self.filled[index]
            for loop, time in enumerate(times):
                for earlier in range(pos):
                    when = ran.get((earlier, loop))
                    assert when is None or when <= time, "read before it was written"


def run(seed: int, loops: int, budget: int) -> Recorder:
    rng = np.random.default_rng(seed)
    requests = [Request(rng, loops) for _ in range(int(rng.integers(1, 7)))]
    recorder = Recorder(requests, loops)
    for _ in range(500):
        waiting = [i for i, r in enumerate(requests) if not r.ended]
        if not waiting:
            return recorder
        chosen = [i for i in waiting if rng.random() < 0.8] or waiting[:1]
        recorder.step(chosen, budget)
    raise AssertionError("requests never ended")


@pytest.mark.parametrize("loops", [1, 2, 4, 6])
@pytest.mark.parametrize("budget", [3, 100])
def test_every_cell_runs_once_and_in_order(loops: int, budget: int) -> None:
    for seed in range(60):
        recorder = run(seed, loops, budget)
        for index in range(len(recorder.requests)):
            recorder.check(index)


@pytest.mark.parametrize("exact", [False, True])
def test_nothing_runs_a_loop_that_the_request_cannot_read(exact: bool) -> None:
    """Neither its prompt, nor what it owes in `exact`; and such a position owes no stand-in."""
    forced = np.array([1, 2])
    work = Work(0, 3, 3, prompt=3, last=9, forced=forced, deepest=2, exact=exact)
    plan = StepPlan([work], LOOPS)
    alive, loops_run = [], []
    for _ in range(3):
        out = plan.readout(plan.rows.loop + 1 >= plan.rows.high)
        loops_run += out.loops_run.tolist()
        move = plan.advance(out, np.zeros(len(out), np.int64), np.zeros(len(out), bool))
        assert len(move.left) == 0
        alive.append(plan.rows.pos.tolist())
    assert alive == [[0, 1, 2, 3], [3], [4]]
    assert loops_run == [2, 2]


def test_what_follows_a_shared_prompt_waits_until_it_has_run_every_loop() -> None:
    """It reads the prompt's last loop from its first on; later tokens follow each other at once."""
    work = Work(0, 3, 3, prompt=3, last=9, forced=np.ones(1, int), shared=True)
    plan = StepPlan([work], LOOPS)
    for _ in range(LOOPS):
        out = plan.readout(plan.rows.loop + 1 >= plan.rows.high)
        plan.advance(out, np.zeros(len(out), np.int64), np.zeros(len(out), bool))
        assert set(plan.rows.pos.tolist()) <= {0, 1, 2}
    assert not len(plan.rows)
    work = Work(3, 1, 4, prompt=3, last=9, forced=np.ones(1, int), shared=True)
    plan = StepPlan([work], LOOPS)
    for expected in (4, 5, 6):
        out = plan.readout(np.ones(1, bool))
        plan.advance(out, np.zeros(1, np.int64), np.zeros(1, bool))
        assert plan.rows.pos.tolist() == [expected]


def test_a_step_yields_up_to_one_token_per_pass() -> None:
    work = Work(start=4, count=1, known=5, prompt=5, last=100, forced=np.ones(1, int))
    plan = StepPlan([work], LOOPS)
    tokens = 0
    while len(plan.rows) and plan.passes_left:
        out = plan.readout(np.ones(len(plan.rows), bool))
        tokens += len(out.rows)
        plan.advance(out, np.zeros(len(out.rows), np.int64), np.zeros(len(out.rows), bool))
    assert tokens == LOOPS


@pytest.mark.parametrize(("shared", "rows"), [(False, [3, 4, 4, 4]), (True, [3, 3, 3, 3])])
def test_in_shared_nothing_starts_before_the_prompt_is_complete(
    shared: bool, rows: list[int]
) -> None:
    """A generated position reads loop T of its prompt at every loop."""
    request = Work(0, 3, 3, 3, 9, forced=np.array([1]), shared=shared)
    plan, ran = StepPlan([request], LOOPS), []
    for _ in range(LOOPS):
        ran.append(len(plan.rows))
        out = plan.readout(plan.rows.loop + 1 >= plan.rows.low)
        plan.advance(out, np.zeros(len(out), np.int64), np.zeros(len(out), bool))
    assert ran == rows


def test_recomputed_positions_stop_where_they_left() -> None:
    work = Work(start=0, count=6, known=6, prompt=3, last=100, max_loops=4, depths=[2, 1, 3])
    plan = StepPlan([work], LOOPS)
    assert plan.rows.stop[:5].tolist() == [4, 4, 4, 1, 3]
    assert (plan.rows.stop == HEAD).tolist() == [False] * 5 + [True]
    out = plan.readout(np.zeros(6, bool))
    move = plan.advance(out, np.zeros(0, np.int64), np.zeros(0, bool))
    assert (move.left.pos.tolist(), move.left.depth.tolist()) == ([3], [1])
    assert plan.rows.pos.tolist() == [0, 1, 2, 4, 5]
    segments = plan.segments()
    assert segments.first.tolist() == [0, 3, 5] and segments.seq_len.tolist() == [3, 6]


def test_a_chunk_of_one_recomputed_position_and_the_head_stops_where_it_left() -> None:
    work = Work(start=4, count=2, known=6, prompt=3, last=100, max_loops=4, depths=[2, 1, 3])
    assert StepPlan([work], LOOPS).rows.stop.tolist() == [3, HEAD]


@pytest.mark.parametrize(("start", "stays"), [(0, [0, 1, 2]), (3, [])])
def test_an_exact_request_that_ends_owes_the_loops_of_its_prompt_alone(
    start: int, stays: list[int]
) -> None:
    """From the first generated position on: nobody reads them again."""
    known = max(start + 1, 3)
    work = Work(start, known - start, known, prompt=3, last=100, forced=np.ones(1, int), exact=True)
    plan = StepPlan([work], LOOPS)
    for ended in (False, True):
        out = plan.readout(plan.rows.loop + 1 >= plan.rows.high)
        assert len(out) == 1
        plan.advance(out, np.zeros(1, np.int64), np.array([ended]))
    assert plan.rows.pos.tolist() == stays


def test_prompt_positions_are_one_sequence() -> None:
    work = [Work(start=0, count=5, known=5, prompt=5, last=9, max_loops=4)]
    work.append(Work(start=7, count=1, known=8, prompt=2, last=9, max_loops=4))
    segments = StepPlan(work, LOOPS).segments()
    assert segments.first.tolist() == [0, 5, 6]
    assert segments.seq_len.tolist() == [5, 8]
    assert segments.max_query == 5


def test_nothing_follows_the_last_position_allowed() -> None:
    work = Work(start=4, count=1, known=5, prompt=5, last=4, forced=np.ones(1, int))
    plan = StepPlan([work], LOOPS)
    out = plan.readout(np.ones(1, bool))
    plan.advance(out, np.zeros(1, np.int64), np.zeros(1, bool))
    assert not (plan.rows.stop == HEAD).any()


def test_a_readout_knows_the_gate_after_each_of_its_loops() -> None:
    """Also of a head that was carried over, of one that took another row, and of depth T."""
    work = Work(start=4, count=1, known=5, prompt=5, last=9, forced=np.array([3, 2, LOOPS]))
    survival = iter(np.float32([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]))
    seen = []
    for _ in range(3):
        plan = StepPlan([work], LOOPS)
        while len(plan.rows) and plan.passes_left:
            heads = plan.rows.stop == HEAD
            if heads.any():
                plan.rows.survival[heads] = next(survival)
            out = plan.readout(plan.rows.loop + 1 >= plan.rows.high)
            seen += out.cdf.tolist()
            work.known += len(out.rows)
            plan.advance(out, np.zeros(len(out), np.int64), np.full(len(out.rows), len(seen) == 3))
        work.start = work.known - 1
        work.carried = [carried for _, _, carried in plan.leftovers()]
    expected = [[0.1, 0.2, 0.3, 0], [0.4, 0.5, 0, 0], [0.6, 0.7, 0.8, 1]]
    assert np.allclose(seen, expected, atol=1e-6)
