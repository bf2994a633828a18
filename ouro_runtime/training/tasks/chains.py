"""Following a chain of named links among distractors."""

import itertools
import random

from ouro_runtime.training.tasks.base import Family, Problem

NAMES = "Ann Bob Cal Dan Eve Fay Gus Hal Ian Jan".split()


class Chains(Family):
    """Ten names, each linked to another or, where a chain ends, to itself; where does one lead?

    The asked name is `level + 1` links from its end. At least three chains end somewhere, so the
    end is not told without walking. The answer names the end, then the first stop on the way: the
    end is hard, the first stop is one link away.

    The links are told in the names' order. Shuffled links need a search by content, which a model
    of this size did not find in the time it is given; in order, a link is found by its place.
    """

    name = "chain"
    unit = "links"
    top = 4

    def draw(self, rng: random.Random, level: int) -> Problem:
        names = rng.sample(NAMES, len(NAMES))
        path, others = names[: level + 2], names[level + 2 :]
        leads = dict(itertools.pairwise(path))
        leads[path[-1]] = path[-1]
        for n, name in enumerate(others):
            # Two more ends, then branches anywhere on what is there.
            leads[name] = name if n < 2 else rng.choice(list(leads))
        links = ", ".join(f"{name} to {leads[name]}" for name in NAMES)
        wordings = ("Where does {} lead?", "where does {} lead?", "Where does {} end?")
        asked = rng.choices(wordings, (18, 1, 1))[0].format(path[0])
        answer = f"To {path[-1]} via {path[1]}."
        key = f"chain {links} ? {path[0]}"
        return Problem(self.name, level, key, f"Links: {links}. {asked}", answer)
