"""Cups in a row, swapped pair by pair."""

import random

from ouro_runtime.training.tasks.base import Family, Problem

CUPS = "ABCD"


class Cups(Family):
    """Four cups in some order, then `level + 1` swaps of two places; the answer is their order."""

    name = "cups"
    unit = "swaps"
    top = 5

    def draw(self, rng: random.Random, level: int) -> Problem:
        row = rng.sample(CUPS, len(CUPS))
        start, swaps, last = " ".join(row), [], ""
        for _ in range(level + 1):
            while True:
                i, j = sorted(rng.sample(range(len(CUPS)), 2))
                if f"{i}{j}" != last:  # undoing the swap just made would be an easier problem
                    break
            last = f"{i}{j}"
            row[i], row[j] = row[j], row[i]
            swaps.append(f"{i + 1}-{j + 1}")
        told = ", ".join(swaps)
        shape = rng.choices(
            ("Cups {}. Swap {}. Order?", "cups {}. swap {}. order?", "Cups {}. Swap {}."), (8, 1, 1)
        )[0]
        answer = f"Now {' '.join(row)}."
        return Problem(
            self.name, level, f"cups {start} | {told}", shape.format(start, told), answer
        )
