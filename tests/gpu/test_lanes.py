"""What the host says of a step's read-outs, against lanes that leave at random."""

import random

import numpy as np
import pytest

from ouro_runtime.config import ExitParams
from ouro_runtime.loop.lanes import LaneBook


def limits(params: ExitParams, token: int) -> tuple[int, int]:
    """Least and most loops of a request's token, as the words of `ExitParams` say."""
    if params.forced_depths:
        return (params.forced_depths[token % len(params.forced_depths)],) * 2
    return params.min_loops, params.max_loops


class Lane:
    """One request as the device runs it: leaves at random within its limits."""

    def __init__(self, params: ExitParams, single: bool, loops: int, rng: random.Random) -> None:
        self.params, self.single, self.loops, self.rng = params, single, loops, rng
        self.loop = self.token = 0

    @property
    def stays(self) -> bool:
        return self.params.exit_mode == "exact"

    def step(self, decoding: bool, head: bool) -> list[int]:
        """The passes it is read out after."""
        reads, idle, read = [], False, False
        if not decoding:
            self.loop = 0
        for index in range(self.loops):
            if idle:
                continue
            self.loop += 1
            low, high = limits(self.params, self.token)
            gated = self.params.exit_threshold < 1 and not self.params.forced_depths
            fires = self.loop >= high or (gated and self.loop >= low and self.rng.random() < 0.4)
            fires = head and (fires or self.loop == self.loops)
            if fires and not read:
                reads.append(index)
                self.token += 1
                read = True
            through = self.loop == self.loops
            if (fires and not (self.stays or not decoding)) or through:
                idle = self.single or not decoding
                self.loop, read = 0, False
        return reads


@pytest.mark.parametrize("seed", range(8))
def test_candidates_hold_every_read_out_and_nothing_else_where_depths_are_known(seed: int) -> None:
    rng = random.Random(seed)
    loops = rng.choice((1, 2, 4, 6))
    book = LaneBook(16, loops)
    lanes: dict[int, Lane] = {}
    for slot in rng.sample(range(16), 9):
        low = rng.randint(1, loops)
        params = ExitParams(
            exit_threshold=rng.choice((0.5, 1.0)),
            min_loops=low,
            max_loops=rng.randint(low, loops),
            exit_mode=rng.choice(("skip", "skip", "exact")),
            forced_depths=rng.choice(
                ((), (), tuple(rng.randint(1, loops) for _ in range(rng.randint(1, 5))))
            ),
        )
        single = rng.random() < 0.2
        book.add(slot, params, 0, single)
        lanes[slot] = Lane(params, single, loops, rng)
    first = True
    for _ in range(12):
        slots = rng.sample(sorted(lanes), rng.randint(1, len(lanes))) if not first else list(lanes)
        decoding = np.full(len(slots), not first)
        heads = np.ones(len(slots), bool)
        plan = book.plan(np.array(slots), decoding, heads)
        assert len(plan.candidates) == loops
        for index, slot in enumerate(slots):
            lane = lanes[slot]
            bounds = [limits(lane.params, lane.token)]
            reads = lane.step(bool(decoding[index]), True)
            said = [step for step in range(loops) if index in plan.candidates[step]]
            assert set(reads) <= set(said), (lane.params, reads, said)
            if lane.params.exit_threshold >= 1 or lane.params.forced_depths:
                assert reads == said, (lane.params, reads, said)
            assert (plan.low[0, index], plan.high[0, index]) == bounds[0]
        first = False


def test_full_depth_reads_out_once_a_step() -> None:
    book = LaneBook(4, 4)
    for slot in range(4):
        book.add(slot, ExitParams(1.0, 1, 4, "skip"), 0, False)
    everyone, yes = np.arange(4), np.ones(4, bool)
    for decoding in (~yes, yes, yes):
        plan = book.plan(everyone, decoding, yes)
        assert [len(lanes) for lanes in plan.candidates] == [0, 0, 0, 4]
        assert (plan.low == 1).all() and (plan.high == 4).all()


def test_a_chunk_that_is_not_the_last_is_never_read_out() -> None:
    book = LaneBook(1, 4)
    book.add(0, ExitParams(0.1, 1, 4, "skip"), 0, False)
    plan = book.plan(np.array([0]), np.array([False]), np.array([False]))
    assert not any(len(lanes) for lanes in plan.candidates)


def test_a_request_back_from_a_preemption_goes_on_with_its_next_depth() -> None:
    book = LaneBook(1, 4)
    book.add(0, ExitParams(1.0, 1, 4, "skip", (1, 2, 3)), 2, False)
    plan = book.plan(np.array([0]), np.array([False]), np.array([True]))
    assert plan.low[:, 0].tolist() == [3, 3, 3, 1]
    assert [len(lanes) for lanes in plan.candidates] == [0, 0, 1, 0]
