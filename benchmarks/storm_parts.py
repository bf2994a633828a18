"""The parts of a storm. Each sends a bounded load and says what did not hold."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from benchmarks.mutations import VALID, encoded, mutated
from benchmarks.storm_server import PATIENCE, Held, Stormed

CONNECTIONS = 16
ALLOWED = (501, 503)
"""The statuses of 500 and more that a body may get."""

HEADERS = {"content-type": "application/json"}
REFERENCE = {
    "prompt": "What is 904821 + 583397?",
    "max_tokens": 12,
    "temperature": 0,
    "exit_threshold": 0.5,
    "return_depths": True,
}
DEPTHS: tuple[dict[str, Any], ...] = (
    {},
    {"exit_threshold": 0.5},
    {"exit_threshold": 0.2, "min_loops": 2},
    {"exit_threshold": 0.3, "exit_mode": "exact"},
    {"exit_threshold": 0.3, "exit_mode": "lossless"},
    {"max_loops": 2},
    {"vllm_xargs": {"forced_depths": [1, 3, 2, 4, 1]}},
)
GROWTH_MIB = 64.0
"""Most that a soak may add to the memory of a server that has warmed up."""


@dataclass
class Outcome:
    """What a part brought.

    Attributes:
        part: its name. sent: requests. told: what came back, counted. broken: what did not hold.
        seconds: how long it took.
    """

    part: str
    sent: int = 0
    told: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def row(self) -> dict[str, Any]:
        """For JSON."""
        return vars(self) | {"told": dict(self.told)}


async def reference(target: Stormed, http: httpx.AsyncClient) -> dict[str, Any]:
    """A greedy answer that must always be the same."""
    answer = await http.post("/v1/completions", json=REFERENCE | {"model": target.model})
    choice = answer.raise_for_status().json()["choices"][0]
    return {"text": choice["text"], "depths": choice["depths"]}


async def checked(target: Stormed, outcome: Outcome, before: dict[str, Any]) -> Outcome:
    """What must hold after every part: nothing left of it, and answers as before."""
    if left := await target.settle():
        outcome.broken.append(f"left behind: {left}")
    async with target.client(1) as http:
        if (await http.get("/health")).status_code != 200:
            outcome.broken.append("not healthy")
        if (after := await reference(target, http)) != before:
            outcome.broken.append(f"the reference answer is {after}, was {before}")
    return outcome


async def mutated_requests(target: Stormed, count: int, seed: int = 0) -> Outcome:
    """Bodies that no client should send, over every endpoint."""
    outcome = Outcome("mutated requests", count)
    paths = [path for path in VALID if path != "/v1/depth"]
    numbers = iter(range(count))

    async def send(http: httpx.AsyncClient) -> None:
        for number in numbers:
            rng = random.Random(seed + number)
            path = rng.choice(paths)
            body = mutated(rng, path)
            if isinstance(body, dict) and body.get("model") == "m":
                body = body | {"model": target.model}
            try:
                answer = await http.post(path, content=encoded(body), headers=HEADERS)
            except httpx.HTTPError as error:
                outcome.broken.append(f"{path} seed {seed + number}: {type(error).__name__}")
                continue
            status = answer.status_code
            outcome.told[str(status) if status >= 500 else f"{status // 100}xx"] += 1
            if answer.status_code >= 500 and answer.status_code not in ALLOWED:
                outcome.broken.append(f"{path} seed {seed + number}: {answer.status_code}")

    async with target.client(CONNECTIONS) as http:
        before = await reference(target, http)
        await asyncio.gather(*(send(http) for _ in range(CONNECTIONS)))
    return await checked(target, outcome, before)


async def abandoned_streams(target: Stormed, count: int, seed: int = 0) -> Outcome:
    """Streams whose client leaves, some at once, some after a few tokens."""
    outcome = Outcome("abandoned streams", count)
    numbers = iter(range(count))

    async def leave(http: httpx.AsyncClient) -> None:
        for number in numbers:
            rng = random.Random(seed + number)
            body = {"prompt": f"Go on from {number}:", "max_tokens": 400, "ignore_eos": True}
            body |= {"model": target.model, "stream": True, "n": rng.choice([1, 1, 2])}
            body |= rng.choice(DEPTHS)
            lines = rng.choice([0, 1, 3, 10, 30])
            try:
                async with http.stream("POST", "/v1/completions", json=body) as answer:
                    outcome.told[str(answer.status_code)] += 1
                    if answer.status_code != 200:
                        outcome.broken.append(f"stream {number}: {answer.status_code}")
                        continue
                    async for _ in answer.aiter_lines():
                        lines -= 1
                        if lines < 0:
                            break
            except httpx.HTTPError as error:
                outcome.broken.append(f"stream {number}: {type(error).__name__}")

    async with target.client(CONNECTIONS) as http:
        before = await reference(target, http)
        await asyncio.gather(*(leave(http) for _ in range(CONNECTIONS)))
    return await checked(target, outcome, before)


def mixed_body(rng: random.Random, model: str) -> dict[str, Any]:
    """A completion whose answer is the same whenever it is asked for; its depths too, unless the
    server is to say where to draft."""
    body: dict[str, Any] = {"model": model, "prompt": f"{rng.choice(QUESTIONS)} {rng.random():.3f}"}
    body |= {"max_tokens": rng.randint(30, 120), "ignore_eos": True}
    if rng.random() < 0.5:
        body |= {"temperature": 0}
    else:
        body |= {"temperature": 1.0, "seed": rng.randrange(1 << 30)}
    extras: list[dict[str, Any]] = [{}, {}, {"logprobs": 2}, {"presence_penalty": 0.8}]
    extras += [{"min_p": 0.05}, {"thinking_token_budget": 2}, {"bad_words": ["1"]}]
    if "seed" in body:
        extras.append({"n": 2})
    depth = rng.choice(DEPTHS)
    return body | rng.choice(extras) | depth | {"return_depths": bool(depth)}


QUESTIONS = ("What is 17 + 25?", "Who are you?", "What is (3+4)*2 mod 5?", "Say")


def gist(answer: httpx.Response) -> Any:
    """What two answers to the same request must agree in."""
    if answer.status_code != 200:
        return answer.status_code
    return [(c["text"], c.get("depths"), c["finish_reason"]) for c in answer.json()["choices"]]


async def burst(target: Stormed, count: int, seed: int = 0, distinct: int = 32) -> Outcome:
    """Far more requests at once than seats, in a pool that holds a few: all are answered, each as
    it was alone."""
    outcome = Outcome("burst", count)
    rng = random.Random(seed)
    bodies = [mixed_body(rng, target.model) for _ in range(min(distinct, count))]
    async with target.client(count) as http:
        before = await reference(target, http)
        alone = [gist(await http.post("/v1/completions", json=body)) for body in bodies]
        preempted = (await asyncio.to_thread(target.metrics))["vllm:num_preemptions_total"]
        order = [number % len(bodies) for number in range(count)]
        rng.shuffle(order)
        answers = await asyncio.gather(
            *(http.post("/v1/completions", json=bodies[number], timeout=600) for number in order),
            return_exceptions=True,
        )
    for number, answer in zip(order, answers, strict=True):
        if isinstance(answer, BaseException):
            outcome.broken.append(f"request {number}: {type(answer).__name__}")
        elif gist(answer) != alone[number]:
            outcome.broken.append(f"{bodies[number]}: {gist(answer)}, alone {alone[number]}")
        else:
            outcome.told["as alone"] += 1
    after = (await asyncio.to_thread(target.metrics))["vllm:num_preemptions_total"]
    outcome.told["preemptions"] = int(after - preempted)
    return await checked(target, outcome, before)


async def soak(target: Stormed, seconds: float, seed: int = 0) -> tuple[Outcome, Held, Held]:
    """A steady mix, and what the server holds before and after it."""
    outcome = Outcome("soak")
    deadline = 0.0

    async def client(http: httpx.AsyncClient, number: int) -> None:
        rng = random.Random(seed + number)
        while time.monotonic() < deadline:
            body = mixed_body(rng, target.model)
            if rng.random() < 0.1:
                body |= {"structured_outputs": {"regex": "[a-c]{3}-[0-9]{2}"}, "ignore_eos": False}
            outcome.sent += 1
            try:
                if rng.random() < 0.3:
                    async with http.stream(
                        "POST", "/v1/completions", json=body | {"stream": True}
                    ) as answer:
                        lines = rng.choice([2, 10**6])
                        async for _ in answer.aiter_lines():
                            lines -= 1
                            if lines < 0:
                                break
                else:
                    answer = await http.post("/v1/completions", json=body)
            except httpx.HTTPError as error:
                outcome.broken.append(type(error).__name__)
                continue
            outcome.told[str(answer.status_code)] += 1
            if answer.status_code != 200:
                outcome.broken.append(f"{body}: {answer.status_code}")

    async def load(seconds: float, first: int) -> Held:
        nonlocal deadline
        deadline = time.monotonic() + seconds
        async with target.client(CONNECTIONS) as http:
            await asyncio.gather(*(client(http, first + n) for n in range(CONNECTIONS)))
        await target.settle()
        await asyncio.sleep(1)  # its connections are gone
        return await asyncio.to_thread(target.held)

    async with target.client(1) as http:
        before = await reference(target, http)
    start = await load(min(20.0, seconds / 3), 0)  # warms up
    end = await load(seconds, 1000)
    outcome.broken += growth(start, end)
    return await checked(target, outcome, before), start, end


def growth(start: Held, end: Held) -> list[str]:
    """What a soak has left in a server that it should not have."""
    broken = []
    if end.memory - start.memory > GROWTH_MIB:
        broken.append(f"memory grew by {end.memory - start.memory:.0f} MiB")
    if end.handles > start.handles:
        broken.append(f"file handles grew from {start.handles} to {end.handles}")
    if end.threads > start.threads:
        broken.append(f"threads grew from {start.threads} to {end.threads}")
    if end.kv:
        broken.append(f"{end.kv:.1%} of the K/V pool is in use")
    return broken


LONG = {"max_tokens": 400, "ignore_eos": True}
KILLED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]} | LONG,
    "/v1/completions": {"prompt": "one"} | LONG,
    "/v1/responses": {"input": "x", "max_output_tokens": 400, "ignore_eos": True},
}
"""What runs while the engine is killed."""

ENDED = "stream ended by 503"


async def kill(target: Stormed, each: int = 2) -> Outcome:
    """The engine process is killed under load: every request has its end, and so has the server."""
    asked = [(path, stream) for path in KILLED for stream in (False, True)] * each
    outcome = Outcome("engine killed", len(asked))
    family = target.processes()
    engine = next(p for p in family if "EngineCore" in p.name())

    async def ask(http: httpx.AsyncClient, path: str, stream: bool) -> str:
        body = KILLED[path] | {"model": target.model, "stream": stream}
        answer = await http.post(path, json=body)
        if stream and answer.status_code == 200:
            told = "503" in answer.text or "service_unavailable" in answer.text
            return ENDED if told else "stream ended without a word"
        return str(answer.status_code)

    async with target.client(len(asked)) as http:
        waiting = [asyncio.create_task(ask(http, *one)) for one in asked]
        deadline = time.monotonic() + PATIENCE
        while (await asyncio.to_thread(target.metrics))["vllm:num_requests_running"] < len(asked):
            if time.monotonic() > deadline:
                outcome.broken.append("the load did not come up")
                break
            await asyncio.sleep(0.05)
        engine.send_signal(signal.SIGKILL)
        for ending in await asyncio.gather(*waiting, return_exceptions=True):
            outcome.told[ending if isinstance(ending, str) else type(ending).__name__] += 1
        for ending, count in outcome.told.items():
            if ending not in ("503", ENDED):
                outcome.broken.append(f"{count} requests: {ending}")
        outcome.broken += await refusals(http, target)
    status = await asyncio.to_thread(target.process.wait, PATIENCE)
    if status == 0:
        outcome.broken.append("the server ended with status 0, as if told to")
    _, alive = psutil.wait_procs(family, timeout=5)
    if alive:
        outcome.broken.append(f"still running: {[p.name() for p in alive]}")
    return outcome


async def refusals(http: httpx.AsyncClient, target: Stormed) -> list[str]:
    """What is wrong with how a server without an engine answers, until nobody listens any more."""
    deadline = time.monotonic() + PATIENCE
    body = {"model": target.model, "prompt": "one", "stream": True}
    while time.monotonic() < deadline:
        try:
            answer = await http.post("/v1/completions", json=body)
        except httpx.TimeoutException:
            return ["a request to a server without an engine hangs"]
        except httpx.TransportError:
            return []
        if answer.status_code != 503:
            return [f"a server without an engine answers {answer.status_code}"]
        await asyncio.sleep(0.05)
    return ["the server goes on without an engine"]
