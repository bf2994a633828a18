"""Clients of the load benchmark: problems with exact answers, asked in closed and in open loop."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from tokenizers import Tokenizer

from ouro_runtime.training.evaluate import prompts_of, suite
from ouro_runtime.training.tasks import Problem

MAX_TOKENS = 24
CLASSES = {"premium": 0.04, "standard": 0.36, "batch": 0.6}
"""Priority classes of the shipped presets file -> share of the requests. Premium's floor is near
full depth: were it more than a twentieth of the load, a p95 over all would be premium's alone."""


@dataclass(frozen=True)
class Question:
    """A problem, as it is sent."""

    problem: Problem
    prompt: list[int]
    priority_class: str


@dataclass
class Answer:
    """What came back, in seconds since the run began; `error` if it is not an answer."""

    priority_class: str
    asked: float
    first: float = math.nan
    last: float = math.nan
    tokens: int = 0
    depths: Counter[int] = field(default_factory=Counter)
    right: bool = False
    error: str | None = None

    @property
    def seconds_per_token(self) -> float | None:
        """After the first token; None if there is no second."""
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else None


def questions(count: int, tok: Tokenizer, seed: int, families: Sequence[str]) -> list[Question]:
    """Held-out problems of all difficulties in random order, with random classes."""
    rng = random.Random(f"load {seed}")
    cells = [cell for cell in suite(0) if cell[0] in families]
    drawn = suite(math.ceil(count / len(cells)), seed)
    problems = [problem for cell in cells for problem in drawn[cell]]
    rng.shuffle(problems)
    classes = rng.choices(list(CLASSES), list(CLASSES.values()), k=count)
    chosen = problems[:count]
    return [
        Question(problem, prompt, name)
        for problem, prompt, name in zip(chosen, prompts_of(chosen, tok), classes, strict=True)
    ]


async def ask(
    http: aiohttp.ClientSession, model: str, question: Question, began: float, **fields: Any
) -> Answer:
    """Stream one answer; a failure is noted on it, not raised."""
    body = {
        "model": model,
        "prompt": question.prompt,
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "priority_class": question.priority_class,
        **fields,
    }
    answer = Answer(question.priority_class, time.perf_counter() - began)
    text = ""
    try:
        async with http.post("/v1/completions", json=body) as response:
            if response.status != 200:
                answer.error = (await response.text())[:200]
                return answer
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line[6:])
                if chunk["choices"]:
                    answer.last = time.perf_counter() - began
                    answer.first = answer.last if math.isnan(answer.first) else answer.first
                    text += chunk["choices"][0]["text"]
                if usage := chunk.get("usage"):
                    answer.tokens = usage["completion_tokens"]
                    histogram = usage["depth"]["histogram"]
                    answer.depths = Counter({int(d): n for d, n in histogram.items()})
    except (aiohttp.ClientError, TimeoutError, asyncio.CancelledError) as error:
        answer.error = type(error).__name__
        return answer
    answer.right = question.problem.verify(text)
    return answer


def session(address: str, seconds: float) -> aiohttp.ClientSession:
    """As many connections as asked for, none for longer than `seconds`."""
    return aiohttp.ClientSession(
        address,
        # Idle connections are given up before the server closes them (uvicorn: after 5 s).
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2),
        timeout=aiohttp.ClientTimeout(total=seconds),
    )


async def closed_loop(
    address: str,
    model: str,
    asked: Sequence[Question],
    clients: int,
    thresholds: Mapping[str, float],
) -> list[Answer]:
    """`clients` at once, each asking its next question when the last is answered, at the threshold
    of the question's class."""
    queue = iter(asked)
    answers: list[Answer] = []
    began = time.perf_counter()

    async def client(http: aiohttp.ClientSession) -> None:
        for question in queue:
            threshold = thresholds[question.priority_class]
            answers.append(await ask(http, model, question, began, exit_threshold=threshold))

    async with session(address, 120) as http:
        await asyncio.gather(*(client(http) for _ in range(clients)))
    return answers


async def open_loop(
    address: str, model: str, asked: Iterable[Question], rate: float, seed: int, patience: float
) -> list[Answer]:
    """Ask at `rate` per second, Poisson, whether or not answers keep up; wait at most `patience`
    seconds for each."""
    rng = random.Random(f"arrivals {seed}")
    began = time.perf_counter()
    due = 0.0
    tasks = []
    async with session(address, patience) as http:
        for question in asked:
            due += rng.expovariate(rate)
            await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(http, model, question, began)))
        return list(await asyncio.gather(*tasks))
