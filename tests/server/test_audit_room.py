"""When an audit may run."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from ouro_server.audit.room import MOST_BESIDE, PATIENCE, Guest, Room


class Bench:
    def __init__(self, seats: int = 3) -> None:
        self.now = 10.0
        self.room = Room(seats, step=100, clock=lambda: self.now)
        self.stack = ExitStack()

    def come(self, seats: int = 1) -> Guest:
        return self.stack.enter_context(self.room.guest(seats))


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_an_empty_room_takes_audits_of_any_length(bench: Bench) -> None:
    assert bench.room.takes(100)
    assert bench.room.takes(10_000)


def test_beside_others_only_what_fits_into_a_step(bench: Bench) -> None:
    bench.come()
    assert bench.room.takes(100)
    assert not bench.room.takes(101)


def test_none_where_every_seat_is_taken(bench: Bench) -> None:
    bench.come(2)
    assert bench.room.takes(1)
    bench.come()
    assert not bench.room.takes(1)
    bench.stack.close()
    assert bench.room.takes(1)


def test_none_while_a_request_waits_for_its_first_token(bench: Bench) -> None:
    guest = bench.come()
    bench.now += PATIENCE
    assert bench.room.takes(1)
    bench.now += 0.01
    assert not bench.room.takes(1)
    bench.room.heard(guest)
    assert bench.room.takes(1)


def test_no_request_is_there_for_two(bench: Bench) -> None:
    with bench.room.guest(1):
        with bench.room.audit():
            bench.come()
        assert not bench.room.takes(1)
    assert not bench.room.takes(1), "the one that came during the audit is still there"
    bench.stack.close()
    bench.come()
    assert bench.room.takes(1)


def test_an_arrival_is_told_of(bench: Bench) -> None:
    told: list[int] = []
    bench.room.on_arrival = lambda: told.append(1)
    bench.come()
    assert told == [1]


def test_an_audit_that_others_overtake_is_told_of(bench: Bench) -> None:
    told: list[int] = []
    bench.room.on_standing = lambda: told.append(1)
    guest, many = bench.come(), bench.come(2)
    for _ in range(2):
        bench.room.heard(guest)
        with bench.room.audit():
            for _ in range(MOST_BESIDE):
                bench.room.heard(guest)
                bench.room.heard(many)
    assert not told
    with bench.room.audit():
        for _ in range(MOST_BESIDE + 1):
            bench.room.heard(guest)
    assert told == [1]


def test_whoever_leaves_in_anger_has_left(bench: Bench) -> None:
    with pytest.raises(ZeroDivisionError), bench.room.guest(3):
        raise ZeroDivisionError
    assert bench.room.takes(1000)
