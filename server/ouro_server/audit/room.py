"""When an audit may run, so that it delays no request by more than one pass, and none that waits.

An audit whose prompt and answer fit into one step is read beside requests that run; each of them
waits for that step once, and none is there for a second audit. One that finds no room in the K/V
pool stands in the engine's queue, before whoever comes: it is given up. A longer one takes several
steps: it begins when nobody runs, and is given up as soon as somebody comes, who waits for one step
of it.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

PATIENCE = 0.25
"""Seconds without a first token after which a request is taken to wait: for a seat, or for K/V."""

MOST_BESIDE = 4
"""Outputs of a request beside an audit that is still not over: of the step that ran when the audit
came, the one that it ought to have been in, and two to spare."""


@dataclass(eq=False)
class Guest:
    """A user's request that the engine has.

    Attributes:
        seats: sequences that it runs.
        since: when it came. begun: it has a token. delayed: an audit ran beside it.
        beside: outputs that it got while the running audit did not end.
    """

    seats: int
    since: float
    begun: bool = False
    delayed: bool = False
    beside: int = 0


class Room:
    """The requests that the engine has of this API process, and whether an audit may join them.

    Args:
        seats: sequences that run at once, of this process's share of the engines.
        step: tokens of an audit that surely fit into one step beside others.
        clock: rising seconds.

    Attributes:
        on_arrival: called when a request comes. on_standing: called when an audit that ought to be
            over stands in the engine's queue.
    """

    def __init__(self, seats: int, step: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.seats = seats
        self.step = step
        self.on_arrival: Callable[[], object] | None = None
        self.on_standing: Callable[[], object] | None = None
        self._clock = clock
        self._guests: set[Guest] = set()
        self._audited = False

    @contextmanager
    def guest(self, seats: int) -> Iterator[Guest]:
        """A user's request, while the engine has it."""
        guest = Guest(seats, self._clock(), delayed=self._audited)
        self._guests.add(guest)
        if self.on_arrival is not None:
            self.on_arrival()
        try:
            yield guest
        finally:
            self._guests.discard(guest)

    def heard(self, guest: Guest) -> None:
        """A guest has been given tokens."""
        guest.begun = True
        if self._audited and guest.seats == 1:  # of several sequences each has outputs
            guest.beside += 1
            if guest.beside > MOST_BESIDE and self.on_standing is not None:
                self.on_standing()

    def takes(self, tokens: int) -> bool:
        """Whether an audit of so many tokens may begin."""
        now = self._clock()
        if tokens > self.step:
            return not self._guests
        return sum(guest.seats for guest in self._guests) < self.seats and not any(
            guest.delayed or (not guest.begun and now - guest.since > PATIENCE)
            for guest in self._guests
        )

    @contextmanager
    def audit(self) -> Iterator[None]:
        """An audit runs: whoever is there, or comes, has been delayed by one."""
        self._audited = True
        for guest in self._guests:
            guest.delayed, guest.beside = True, 0
        try:
            yield
        finally:
            self._audited = False
