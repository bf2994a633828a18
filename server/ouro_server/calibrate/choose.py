"""Which threshold may be promised: fixed-sequence testing, with exact binomial tests.

The thresholds are a list that was written down before any answer was seen, from the safest (every
loop) to the cheapest. For each in turn "it loses more than the promise allows" is tested at
the level that the confidence leaves, and the first that cannot be rejected ends the walk: so the
chance that any threshold passed on the way loses more is at most that level, however many there are
and whether or not loss grows along the list. This is fixed-sequence testing in the sense of A. N.
Angelopoulos, S. Bates, E. J. Candes, M. I. Jordan, L. Lei, "Learn then Test: Calibrating Predictive
Algorithms to Achieve Risk Control", arXiv:2110.01052; for a loss that is 0 or 1 the test is the
binomial's own.

It asks that the questions are drawn, one independently of the other, from what will be asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ouro_server.bounds import trials_needed, upper_bound


@dataclass(frozen=True)
class Point:
    """What was seen at one threshold.

    Attributes:
        lost: questions whose answer is lost, of `questions`.
        tokens, agreed: answer tokens, and how many of them are the full-depth choice.
        depths: sum of the tokens' depths.
        right: answers as expected; None if nothing was.
    """

    threshold: float
    questions: int
    lost: int
    tokens: int
    agreed: int
    depths: int
    right: int | None = None

    @property
    def loss(self) -> float:
        return self.lost / self.questions

    @property
    def mean_depth(self) -> float:
        return self.depths / max(1, self.tokens)


@dataclass(frozen=True)
class Choice:
    """The outcome for one promise.

    Attributes:
        loss, confidence: the promise; `confidence` is that of this promise alone.
        bounds: the bound of each point's loss, in the points' order.
        passed: how many points passed, from the first on.
        chosen: the last that did; None if none did.
        stopped: the first that did not; None if all passed.
        needed: the fewest questions that could promise anything.
    """

    loss: float
    confidence: float
    bounds: tuple[float, ...]
    passed: int
    chosen: Point | None
    stopped: Point | None
    needed: int


def choose(points: Sequence[Point], loss: float, confidence: float) -> Choice:
    """The cheapest threshold that loses at most `loss`.

    Args:
        points: from the safest threshold to the cheapest.
        loss: 0..1, exclusive. confidence: that none is chosen that loses more.
    """
    down = [a.threshold > b.threshold for a, b in pairwise(points)]
    assert all(down) or not any(down), "thresholds go one way"
    bounds = tuple(upper_bound(p.lost, p.questions, confidence) for p in points)
    passed = next((i for i, bound in enumerate(bounds) if bound > loss), len(points))
    return Choice(
        loss,
        confidence,
        bounds,
        passed,
        points[passed - 1] if passed else None,
        points[passed] if passed < len(points) else None,
        trials_needed(loss, confidence),
    )
