"""An engine that answers and audits, without an engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry
from vllm.sampling_params import RequestOutputKind, SamplingParams

from ouro_runtime.engine.outputs import AUDIT_ID
from ouro_server.agreement import Agreement
from ouro_server.audit import tap
from ouro_server.audit.auditor import Auditor
from ouro_server.audit.metrics import AuditMetrics
from ouro_server.audit.pick import Picker
from ouro_server.audit.room import Room
from ouro_server.defaults import Defaults
from tests.server.fakes import CONFIG, LOOPS, output, result

SKIP: dict[str, Any] = {
    "exit_threshold": 0.5,
    "min_loops": 1,
    "max_loops": LOOPS,
    "exit_mode": "skip",
    "exit_rule": "gate",
}
WHOLE = SKIP | {"exit_threshold": 1.0}
PROMPT = {"type": "token", "prompt_token_ids": [1, 2, 3]}


def logprob(value: float) -> SimpleNamespace:
    return SimpleNamespace(logprob=value)


def params(extra: dict[str, Any] = SKIP, **fields: Any) -> SamplingParams:
    """A request's sampling params: greedy, whole at the end, skipping, unless said otherwise."""
    fields = {"temperature": 0.0, "output_kind": RequestOutputKind.FINAL_ONLY} | fields
    return SamplingParams(extra_args=dict(extra), **fields)


class Engine:
    """Answers as it is told, and reads prompts as full depth.

    Attributes:
        depths: of the tokens of every answer, whose ids are 100, 101 ..
        other: answer tokens that full depth would not have chosen.
        asked: params of every user's request. audits: (prompt, params, options) of every audit.
        hold: while set, audits do not end.
        fail: raised by audits.
    """

    def __init__(self) -> None:
        self.depths = [2, 4, 1]
        self.other: set[int] = set()
        self.asked: list[SamplingParams] = []
        self.audits: list[tuple[Any, SamplingParams, dict[str, Any]]] = []
        self.aborted = 0
        self.hold: asyncio.Event | None = None
        self.fail: Exception | None = None
        self.finish: str | None = "length"

    async def generate(
        self, prompt: Any, params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncIterator[Any]:
        if request_id.startswith(AUDIT_ID):
            self.audits.append((prompt, params, options))
            await self._hold()
            yield self._read(prompt["prompt_token_ids"])
            return
        self.asked.append(params)
        cuts = [1, len(self.depths)] if params.output_kind == RequestOutputKind.DELTA else [None]
        start = 0
        for cut in cuts:
            yield self._answer(params, start, cut)
            start = cut or 0

    async def _hold(self) -> None:
        if self.fail is not None:
            raise self.fail
        try:
            if self.hold is not None:
                await self.hold.wait()
        except asyncio.CancelledError:
            self.aborted += 1
            raise

    def _answer(self, params: SamplingParams, start: int, end: int | None) -> Any:
        last = end is None or end == len(self.depths)
        made = output(self.depths[start:end], finish=self.finish if last else None)
        made.token_ids = list(range(100, 100 + len(self.depths)))[start:end]
        if params.logprobs is not None:
            made.logprobs = [{token: logprob(-1.0)} for token in made.token_ids]
            made.cumulative_logprob = -1.0
        return result(made)

    def _read(self, ids: list[int]) -> Any:
        entries: list[Any] = [None]
        for token in ids[1:]:
            best = token + 1000 if token in self.other else token
            entries.append({token: logprob(-1.5), best: logprob(-1.25)} | {})
            if best == token:
                entries[-1] = {token: logprob(-1.25), token + 1: logprob(-2.0)}
        made = result()
        made.prompt_logprobs = entries
        return made


class Bench:
    """Audits on that engine; `async with` runs them."""

    def __init__(
        self,
        share: float = 1.0,
        agreement: Agreement | None = None,
        longest: int = 1000,
        step: int = 100,
        adapters: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.engine = Engine()
        self.registry = CollectorRegistry()
        self.metrics = AuditMetrics("m", ("fast",), self.registry)
        self.room = Room(seats=8, step=step)
        self.auditor = Auditor(
            self.engine.generate, self.room, self.metrics, LOOPS, longest, agreement, adapters
        )
        self.picker = Picker(share, LOOPS, Defaults(CONFIG.defaults, LOOPS), agreement, **options)
        self.client = SimpleNamespace(generate=self.engine.generate)
        tap.listen(self.client, self.picker, self.auditor)
        self.told = asyncio.Event()

    async def __aenter__(self) -> Bench:
        self.task = asyncio.create_task(self.auditor.run(self.told))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.told.set()
        await asyncio.wait_for(self.task, 5)

    async def ask(
        self, asked: SamplingParams | None = None, prompt: Any = PROMPT, **options: Any
    ) -> list[Any]:
        """A user's request; what came back."""
        results = self.client.generate(prompt, asked or params(), "cmpl-1", **options)
        return [made async for made in results]

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait for it, two seconds at most."""
        for _ in range(400):
            if holds():
                return
            await asyncio.sleep(0.005)
        raise AssertionError("it never came to hold")

    def count(self, name: str, source: str = "default", preset: str = "") -> float:
        labels = {"model_name": "m", "source": source, "preset": preset}
        value = self.registry.get_sample_value(f"ouro_{name}", labels)
        assert value is not None, name
        return value

    def counts(self) -> list[float]:
        """Audited and agreeing requests, audited and agreeing tokens."""
        names = ("audited_requests", "agreeing_requests", "audited_tokens", "agreeing_tokens")
        return [self.count(f"{name}_total") for name in names]

    def unaudited(self) -> dict[str, float]:
        """Reasons that were counted."""
        return {
            sample.labels["reason"]: sample.value
            for family in self.registry.collect()
            for sample in family.samples
            if sample.name == "ouro_unaudited_requests_total" and sample.value
        }


def run(bench: Bench, play: Callable[[Bench], Awaitable[None]]) -> Bench:
    """Play on a bench, from its start to its end."""

    async def whole() -> None:
        async with bench:
            await play(bench)

    asyncio.run(whole())
    return bench
