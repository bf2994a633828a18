"""Batches: chats about freshly drawn problems, packed into rows of fixed length."""

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ouro_runtime.training.tasks import FAMILIES, SYSTEM_PROMPTS, Chat
from ouro_runtime.training.tokenizer import render

MASKED = -1e9


@dataclass
class Curriculum:
    """Each family's level; it rises when the family is right `pass_rate` of the time at its level.

    A curriculum by time instead asks for chains of five links before one link is understood.
    """

    levels: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FAMILIES, 0))
    tops: dict[str, int] = field(default_factory=lambda: {n: f.top for n, f in FAMILIES.items()})
    rates: dict[str, float] = field(default_factory=lambda: dict.fromkeys(FAMILIES, 0.0))
    seen: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FAMILIES, 0))
    pass_rate: float = 0.9
    min_seen: int = 200
    memory: float = 0.99

    def pick(self, rng: random.Random) -> tuple[str, int]:
        """A family, and a level: half the time the present one, else any; any, once at the top."""
        least = min(self.levels.values())
        # The family that is furthest behind gets the most problems, one that is done the fewest.
        weights = [0.25 if self.done(n) else 1 / (1 + self.levels[n] - least) for n in FAMILIES]
        name = rng.choices(tuple(FAMILIES), weights)[0]
        level = self.levels[name]
        # Some habits of the hardest level (how long an answer is) have to be unlearned in the end.
        present = level < self.tops[name] and rng.random() < 0.5
        return name, level if present else rng.randint(0, level)

    def done(self, name: str) -> bool:
        """Whether the hardest level is learned; it is then only kept from being forgotten."""
        return self.levels[name] == self.tops[name] and self.rates[name] >= 0.95

    def record(self, name: str, level: int, right: bool) -> None:
        """Count one answer; only those at the present level move the curriculum."""
        if level != self.levels[name]:
            return
        self.seen[name] += 1
        memory = min(self.memory, 1 - 1 / (self.seen[name] + 1))
        self.rates[name] = memory * self.rates[name] + (1 - memory) * right
        if (
            self.seen[name] >= self.min_seen
            and self.rates[name] >= self.pass_rate
            and level < self.tops[name]
        ):
            self.levels[name], self.rates[name], self.seen[name] = level + 1, 0.0, 0

    def state(self) -> dict[str, Any]:
        return {"levels": self.levels, "rates": self.rates, "seen": self.seen}

    def load(self, state: dict[str, Any]) -> None:
        self.levels, self.rates, self.seen = (
            dict(state["levels"]), dict(state["rates"]), dict(state["seen"]),
        )  # fmt: skip


@dataclass
class Chunk:
    """One conversation: its tokens, and for each answer (family, level, start, end) in them."""

    ids: list[int]
    answers: list[tuple[str, int, int, int]]


@dataclass
class Batch:
    """ids [B, S] int64; bias [B, 1, S, S] float, `MASKED` across conversations and to the future;
    pick [N] flat positions that predict an answer token; target [N] that token; spans: (family,
    level, start, end) of each answer in the N."""

    ids: Tensor
    bias: Tensor
    pick: Tensor
    target: Tensor
    spans: list[tuple[str, int, int, int]]

    def thresholds(self, rng: random.Random, full: float) -> Tensor:
        """[B, S] float: a drawn threshold per row for positions whose input token was generated,
        which may leave the loop early; 1 elsewhere, and in a share `full` of the rows everywhere.
        """
        rows, length = self.ids.shape
        drawn = torch.tensor([1.0 if rng.random() < full else rng.random() for _ in range(rows)])
        generated = torch.zeros(rows * length, dtype=torch.bool)
        generated[self.pick] = True
        # An answer's first token comes from the last position of its prompt, which runs every loop.
        generated[self.pick[[start for _, _, start, _ in self.spans]]] = False
        return torch.where(generated.view(rows, length), drawn[:, None], 1.0)

    def to(self, device: torch.device) -> "Batch":
        ids, bias, pick, target = (
            x.to(device) for x in (self.ids, self.bias, self.pick, self.target)
        )
        return Batch(ids, bias, pick, target, self.spans)


class ChatSource:
    """Draws conversations at the curriculum's levels; deterministic in the generator given."""

    def __init__(self, tok: Tokenizer, curriculum: Curriculum, chat_share: float = 0.04) -> None:
        self.tok, self.curriculum, self.chat_share = tok, curriculum, chat_share
        self.chat = Chat()

    def turn(self, rng: random.Random) -> tuple[str, int, str, str]:
        """(family, level, question, answer) of the training split."""
        if rng.random() < self.chat_share:
            return ("chat", 0, *self.chat.sample(rng))
        name, level = self.curriculum.pick(rng)
        problem = FAMILIES[name].sample(rng, level, "train")
        return name, level, problem.question, problem.answer

    def chunk(self, rng: random.Random, limit: int) -> Chunk:
        """One conversation of at most `limit` tokens: mostly one subject, now and then several."""
        count = rng.choices((1, 2, 3), (12, 2, 1))[0]
        ids: list[int] = []
        answers = []
        if rng.random() < 0.04:
            ids = self.tok.encode(render([("system", rng.choice(SYSTEM_PROMPTS))])).ids
        for _ in range(count):
            name, level, question, answer = self.turn(rng)
            head = self.tok.encode(render([("user", question)], reply=True)).ids
            tail = self.tok.encode(f"{answer}<|im_end|>\n").ids
            if len(ids) + len(head) + len(tail) > limit:
                break
            start = len(ids) + len(head)
            # The newline after <|im_end|> is context for the next turn; nothing has to predict it.
            answers.append((name, level, start, start + len(tail) - 1))
            ids = ids + head + tail
        return Chunk(ids, answers)

    def batch(self, rng: random.Random, rows: int, length: int) -> Batch:
        """`rows` rows of `length` tokens, packed first-fit from as many conversations as fit."""
        packed: list[list[Chunk]] = [[] for _ in range(rows)]
        room = [length] * rows
        misses = 0
        while misses < 6:
            chunk = self.chunk(rng, length)
            if not chunk.answers:
                continue
            fits = [r for r in range(rows) if room[r] >= len(chunk.ids)]
            if not fits:
                misses += 1
                continue
            row = min(fits, key=lambda r: room[r])
            packed[row].append(chunk)
            room[row] -= len(chunk.ids)
        return pack(packed, length)


def pack(packed: list[list[Chunk]], length: int) -> Batch:
    """Lay the conversations of each row side by side; they do not see each other."""
    rows = len(packed)
    ids = torch.zeros(rows, length, dtype=torch.long)
    owner = torch.full((rows, length), -1)
    pick: list[int] = []
    target: list[int] = []
    spans = []
    for r, chunks in enumerate(packed):
        at = 0
        for c, chunk in enumerate(chunks):
            end = at + len(chunk.ids)
            ids[r, at:end] = torch.tensor(chunk.ids)
            owner[r, at:end] = c
            for name, level, a, b in chunk.answers:
                spans.append((name, level, len(pick), len(pick) + b - a))
                pick.extend(range(r * length + at + a - 1, r * length + at + b - 1))
                target.extend(chunk.ids[a:b])
            at = end
    same = owner[:, :, None] == owner[:, None, :]
    allowed = same & torch.ones(length, length, dtype=torch.bool).tril()
    bias = torch.where(allowed, 0.0, MASKED)[:, None]
    return Batch(ids, bias, torch.tensor(pick), torch.tensor(target), spans)
