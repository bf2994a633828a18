"""Multi-digit sums and differences, and expressions modulo a small number."""

import random

from ouro_runtime.training.tasks.base import Family, Problem

MODULUS = 5


class Sums(Family):
    """a + b and a - b (a >= b). The longer operand has `level + 1` digits."""

    name = "sum"
    unit = "digits"
    top = 5

    def draw(self, rng: random.Random, level: int) -> Problem:
        digits = level + 1
        a = self._number(rng, digits)
        # Mostly equal lengths, where carries are longest; now and then a shorter operand.
        b = self._number(rng, digits if rng.random() < 0.7 else rng.randint(1, digits))
        plus = rng.random() < 0.5
        if plus:
            key = f"sum {min(a, b)} {max(a, b)}"
            answer = a + b
            if rng.random() < 0.5:
                a, b = b, a
        else:
            a, b = max(a, b), min(a, b)
            key, answer = f"difference {a} {b}", a - b
        sign = "+" if plus else "-"
        expr = f"{a} {sign} {b}" if rng.random() < 0.9 else f"{a}{sign}{b}"
        # Mostly one wording: the distance from a digit to its place in the answer then says a lot.
        shape = rng.choices(
            ("What is {}?", "what is {}?", "What's {}?", "Compute {}.", "{}?", "{}", "{} = ?"),
            (80, 4, 3, 4, 3, 3, 3),
        )[0]
        return Problem(self.name, level, key, shape.format(expr), str(answer))

    @staticmethod
    def _number(rng: random.Random, digits: int) -> int:
        return rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)


class Expressions(Family):
    """Nested + - * over digits below `MODULUS`, `level + 1` operations: ((3+4)*2)-1.

    The answer names the value, then the values of the parentheses, innermost first: the value is
    hard, what follows is one operation away from what stands there."""

    name = "mod"
    unit = "operations"
    top = 5

    def draw(self, rng: random.Random, level: int) -> Problem:
        value = rng.randrange(MODULUS)
        expr, inner = str(value), []
        for n in range(level + 1):
            if n:
                expr = f"({expr})"
                inner.append(str(value))
            op, b = rng.choice("+-*"), rng.randrange(MODULUS)
            # Times zero would make everything before it irrelevant.
            b = max(b, 1) if op == "*" else b
            value = (value + b if op == "+" else value - b if op == "-" else value * b) % MODULUS
            expr += f"{op}{b}"
        shape = rng.choices(
            ("What is {} mod {}?", "what is {} mod {}?", "{} mod {}", "Compute {} mod {}."),
            (80, 5, 5, 10),
        )[0]
        answer = f"It is {value}" + (f" via {', '.join(inner)}" if inner else "") + "."
        return Problem(self.name, level, f"mod {expr}", shape.format(expr, MODULUS), answer)
