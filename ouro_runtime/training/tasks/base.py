"""What a task family is, and which of its problems are held out."""

import hashlib
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "test"]
HELD_OUT_IN = 10
"""One problem in this many is never trained on."""


@dataclass(frozen=True)
class Problem:
    """A question and its one right answer.

    `key` names the problem whatever its wording: two questions that ask the same have the same key.
    """

    family: str
    level: int
    key: str
    question: str
    answer: str

    def verify(self, reply: str) -> bool:
        """Whether `reply` is the answer, to the character but for white space around it."""
        return reply.strip() == self.answer


def is_held_out(key: str) -> bool:
    """The split is a property of the problem itself, so no seed can move it across."""
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_IN == 0


class Family(ABC):
    """Problems of one kind.

    Level 0 is a warm-up of the curriculum: trained on, not part of the difficulties that are
    reported (its problems are so few that 500 held-out ones do not exist). Levels 1..top are.
    """

    name: str
    unit: str
    """What a problem of level n has n + 1 of."""
    top: int
    """The hardest level that ships."""

    @abstractmethod
    def draw(self, rng: random.Random, level: int) -> Problem:
        """A problem of exactly this level, of either split."""

    def sample(self, rng: random.Random, level: int, split: Split) -> Problem:
        """A problem of this level and split, by rejection."""
        wanted = split == "test"
        for _ in range(10_000):
            problem = self.draw(rng, level)
            if is_held_out(problem.key) == wanted:
                return problem
        raise ValueError(f"{self.name} level {level} has no problem in split {split!r}")
