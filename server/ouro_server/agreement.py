"""The rule that moves default thresholds by audits, so that a target agreement holds.

Agreement is the share of greedy answers that are those of full depth, token for token. Each
priority class has a ladder from the operator's default threshold (rung 0) to the class's floor. A
rung is tried on requests that are audited, and on no others; it is proven, and may be given to all,
when an exact binomial test (`bounds.py`) says that it loses no more than the target allows. Rungs
are tried one after the other from the top, which is fixed-sequence testing (`calibrate/choose.py`
has the reference): that many rungs are tried costs no confidence. That a rung is tried again does,
so each try is held to half the error of the one before. A proven rung is watched, and withdrawn
when the same kind of test says that it loses more.

It is assumed that a higher threshold agrees no less. This knows no clock and no server: requests
and verdicts are arguments.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from ouro_server.bounds import at_most, trials_needed


@dataclass(frozen=True)
class Rule:
    """The constants of the rule.

    Attributes:
        target: the share of answers that shall be those of full depth; above 0 and below 1.
        confidence: that all tries of a rung together do not pass one that loses more.
        rungs: steps from the operator's default to the floor.
        spare: answers a try may lose and still pass. More of them need more audits, but let rungs
            pass more often that lose little.
        most_halvings: tries after which neither the error is halved nor the rest doubled again.
    """

    target: float
    confidence: float = 0.95
    rungs: int = 6
    spare: int = 2
    most_halvings: int = 6

    @property
    def loss(self) -> float:
        """The share of answers that may be lost."""
        return 1 - self.target

    def audits(self, tries: int) -> int:
        """Audits that the next try of a rung takes after so many failed ones."""
        error = (1 - self.confidence) / 2 ** (1 + min(tries, self.most_halvings))
        return trials_needed(self.loss, 1 - error, self.spare)

    def too_many(self, audits: int) -> int:
        """The fewest lost answers among so many that show that a rung loses too much."""
        return _too_many(audits, self.loss, self.confidence)


@cache
def _too_many(audits: int, loss: float, confidence: float) -> int:
    return next(n for n in range(1, audits + 2) if at_most(n - 1, audits, loss) >= confidence)


class Ticket(NamedTuple):
    """An audited request's part in a test: served at `threshold`, counted in block `block`."""

    priority_class: str
    threshold: float
    block: int


@dataclass
class Ladder:
    """What is known of one class.

    Attributes:
        proven: the lowest rung that may be given to all; -1 if not even the operator's default is.
        tries: failed tries by rung.
        block: counts the tests; a verdict of an earlier one counts no more.
        rest: requests that pass by before the next rung is tried (again).
        audits, missed: of the running test.
    """

    proven: int
    tries: dict[int, int] = field(default_factory=dict)
    block: int = 0
    rest: int = 0
    audits: int = 0
    missed: int = 0

    def begin(self) -> None:
        """Another test begins."""
        self.block += 1
        self.audits = self.missed = 0


class Agreement:
    """The rule with its state.

    Args:
        rule: the constants.
        floors: priority class -> the lowest threshold it may be given.
        ceiling: the operator's default threshold.
        whole: whether the ceiling runs every loop, so that there is nothing to prove of it.

    Attributes:
        stopped: nobody puts what is proven in force any more, so nothing is tried.
    """

    def __init__(
        self, rule: Rule, floors: Mapping[str, float], ceiling: float, whole: bool
    ) -> None:
        self.rule = rule
        self.floors = floors
        self.outcomes = {"proven": 0, "failed": 0, "withdrawn": 0}
        self.stopped = False
        self.start(ceiling, whole)

    def start(self, ceiling: float, whole: bool) -> None:
        """Begin anew, knowing nothing: the operator's defaults are others."""
        self.ceiling, self.whole = ceiling, whole
        blocks = {name: ladder.block + 1 for name, ladder in getattr(self, "ladders", {}).items()}
        self.ladders = {
            name: Ladder(0 if whole else -1, block=blocks.get(name, 0)) for name in self.floors
        }

    def threshold(self, name: str, rung: int) -> float:
        """What a rung of a class is."""
        height = max(self.ceiling - self.floors[name], 0.0)
        return round(self.ceiling - height * rung / self.rule.rungs, 4)

    def allowed(self, name: str) -> float:
        """How much depth a class may give up: 0 none, 1 down to its floor."""
        return max(self.ladders[name].proven, 0) / self.rule.rungs

    def proven(self, name: str) -> float:
        """The lowest threshold that a class may be given."""
        return self.threshold(name, max(self.ladders[name].proven, 0))

    def trial(self, name: str) -> float | None:
        """The threshold that is being tried; None if none is."""
        ladder = self.ladders[name]
        trying = not ladder.rest and self._has_next(name)
        return self.threshold(name, ladder.proven + 1) if trying else None

    def needed(self, name: str) -> int:
        """Audits that the running test of a class takes in all."""
        ladder = self.ladders[name]
        trying = self.trial(name) is not None
        return self.rule.audits(ladder.tries.get(ladder.proven + 1, 0) if trying else 0)

    @property
    def missed(self) -> list[str]:
        """Classes whose target is missed at the operator's own default."""
        return [name for name, ladder in self.ladders.items() if ladder.proven < 0 and ladder.tries]

    def assign(self, name: str) -> Ticket | None:
        """What a request of this class, that will be audited, is served at and counted in; None if
        it tells nothing."""
        if self.stopped:
            return None
        ladder = self.ladders[name]
        tried = self.trial(name)
        if tried is None:
            if ladder.rest:
                ladder.rest -= 1
                if not ladder.rest:
                    ladder.begin()
            if ladder.proven < 0 or (ladder.proven == 0 and self.whole):
                return None
            tried = self.proven(name)
        return Ticket(name, tried, ladder.block)

    def hear(self, ticket: Ticket, agreed: bool) -> None:
        """An audit's verdict: whether the answer is that of full depth."""
        name = ticket.priority_class
        ladder = self.ladders[name]
        if ticket.block != ladder.block:
            return
        needed = self.needed(name)
        ladder.audits += 1
        ladder.missed += not agreed
        if self.trial(name) is not None:
            self._try(ladder, needed)
        else:
            self._watch(ladder, needed)

    def _try(self, ladder: Ladder, needed: int) -> None:
        rung = ladder.proven + 1
        if ladder.missed > self.rule.spare:
            tries = ladder.tries[rung] = ladder.tries.get(rung, 0) + 1
            ladder.rest = self.rule.audits(0) * 2 ** min(tries - 1, self.rule.most_halvings)
            self._end(ladder, "failed")
        elif ladder.audits >= needed:
            ladder.proven = rung
            self._end(ladder, "proven")

    def _watch(self, ladder: Ladder, needed: int) -> None:
        # The test is of a whole block; its outcome is known as soon as too many are lost.
        if ladder.missed >= self.rule.too_many(needed):
            rung = ladder.proven
            ladder.proven -= 1
            ladder.tries[rung] = ladder.tries.get(rung, 0) + 1
            ladder.rest = self.rule.audits(0)
            self._end(ladder, "withdrawn")
        elif ladder.audits >= needed:
            ladder.begin()

    def _end(self, ladder: Ladder, outcome: str) -> None:
        self.outcomes[outcome] += 1
        ladder.begin()

    def _has_next(self, name: str) -> bool:
        """Whether a rung is left to try; where floor and ceiling are one, the first is all."""
        rung = self.ladders[name].proven + 1
        return rung == 0 or (rung <= self.rule.rungs and self.floors[name] < self.ceiling)
