"""Reads answers once more at full depth, one at a time, when there is room."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ouro_runtime.config import DepthError
from ouro_runtime.engine.outputs import AUDIT_ID
from ouro_server.agreement import Agreement
from ouro_server.audit.metrics import DROPPED, FAILED, INTERRUPTED, LONG, AuditMetrics
from ouro_server.audit.pick import Pick
from ouro_server.audit.room import Room
from ouro_server.audit.verdict import judge
from ouro_server.choices import pass_params
from ouro_server.vllm_api import EngineDeadError, RequestOutputKind

MOST_ANSWERS = 64
MOST_TOKENS = 2**17
"""What waits to be audited, at most; more is dropped, and counted."""

MOST_TRIES = 3
"""Times that an answer's audit is begun and interrupted before it is dropped."""

LOOK = 0.01
"""Seconds between two looks whether there is room."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """An answer that was picked, in memory until it is audited or dropped.

    Attributes:
        pick: why and how. prompt, tokens: token ids. depths: of the tokens.
        served: a sampled answer's log-probabilities, as served.
        adapter: vLLM's LoRA request, if it went through one. salt: of the prefix cache.
        tries: times its audit was begun and given up.
    """

    pick: Pick
    prompt: list[int]
    tokens: list[int]
    depths: list[int]
    served: list[float]
    adapter: Any = None
    salt: str | None = None
    tries: int = 0

    @property
    def length(self) -> int:
        """Tokens of its pass."""
        return len(self.prompt) + len(self.tokens)


class Auditor:
    """The queue of answers, and the task that audits them.

    Args:
        generate: vLLM's `AsyncLLM.generate`, past which no user's request is counted.
        room: says when. metrics: told every verdict.
        loops: T. longest: the model's longest sequence.
        agreement: told verdicts of answers that try a threshold.
        adapters: those that are loaded, by name.
    """

    def __init__(
        self,
        generate: Callable[..., Any],
        room: Room,
        metrics: AuditMetrics,
        loops: int,
        longest: int,
        agreement: Agreement | None = None,
        adapters: Mapping[str, Any] | None = None,
    ) -> None:
        self.room = room
        self.ended = False
        self._generate = generate
        self._metrics = metrics
        self._loops = loops
        self._longest = longest
        self._agreement = agreement
        self._adapters = {} if adapters is None else adapters
        self._queue: deque[Answer] = deque()
        self._offered = asyncio.Event()
        self._count = 0

    @property
    def waiting(self) -> int:
        """Answers that wait to be audited."""
        return len(self._queue)

    def skip(self, reason: str) -> None:
        """A picked answer is not audited."""
        self._metrics.skip(reason)

    def offer(self, answer: Answer) -> None:
        """Take a finished answer; one that skipped nothing is that of full depth."""
        if self.ended:
            return
        if answer.pick.true and all(depth >= self._loops for depth in answer.depths):
            self._tell(answer.pick, True)
        elif answer.length >= self._longest:
            self.skip(LONG)
        elif self._full(answer.length):
            self.skip(DROPPED)
        else:
            self._queue.append(answer)
            self._offered.set()

    def _full(self, tokens: int) -> bool:
        if not self._queue:
            return False
        held = sum(answer.length for answer in self._queue)
        return len(self._queue) >= MOST_ANSWERS or held + tokens > MOST_TOKENS

    async def warm_up(self) -> None:
        """Let the engine make, before anybody waits, what the first log-probabilities need: vLLM
        compiles how they are ranked, which takes seconds, once for a row and once for more."""
        prompt = {"type": "token", "prompt_token_ids": [0] * min(4, self._longest - 1)}
        params = pass_params(self._loops, detokenize=False, logprobs=0)
        async for _ in self._generate(prompt, params, f"{AUDIT_ID}0"):
            pass

    async def run(self, told: asyncio.Event) -> None:
        """Audit until the server is told to stop, or the engine has died."""
        work = asyncio.create_task(self._work())
        stop = asyncio.create_task(told.wait())
        try:
            await asyncio.wait((work, stop), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.ended = True
            self._queue.clear()
            for task in (work, stop):
                task.cancel()
            await asyncio.gather(work, stop, return_exceptions=True)

    async def _work(self) -> None:
        while True:
            await self._offered.wait()
            answer = next((a for a in self._queue if self.room.takes(a.length)), None)
            if answer is None:
                await asyncio.sleep(LOOK)
                continue
            self._queue.remove(answer)
            if not self._queue:
                self._offered.clear()
            try:
                await self._audit(answer)
            except EngineDeadError:
                return
            except DepthError:
                self.skip(LONG)  # the pool that held the answer at fewer loops does not at all
            except Exception as error:
                # Its words may be a user's.
                logger.warning("an audit failed: %s", type(error).__name__)
                self.skip(FAILED)

    async def _audit(self, answer: Answer) -> None:
        if answer.adapter is not None and not self._loaded(answer.adapter):
            self.skip(FAILED)
            return
        with self.room.audit():
            reading = asyncio.create_task(self._read(answer))
            if answer.length > self.room.step:
                self.room.on_arrival = reading.cancel
            else:
                self.room.on_standing = reading.cancel
            try:
                await asyncio.wait((reading,))
            finally:
                self.room.on_arrival = self.room.on_standing = None
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)
        if reading.cancelled():
            self._again(replace(answer, tries=answer.tries + 1))
            return
        logprobs = reading.result()
        verdict = judge(
            answer.tokens,
            logprobs[len(answer.prompt) :],
            None if answer.pick.greedy else answer.served,
        )
        self._metrics.count(answer.pick.origin, verdict)
        if answer.pick.greedy:
            self._tell(answer.pick, verdict.agrees)

    async def _read(self, answer: Answer) -> Any:
        """The pass: log-probabilities of prompt and answer at full depth."""
        self._count += 1
        prompt: dict[str, Any] = {
            "type": "token",
            "prompt_token_ids": [*answer.prompt, *answer.tokens],
        }
        if answer.salt is not None:
            prompt["cache_salt"] = answer.salt
        params = pass_params(
            self._loops, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        name = f"{AUDIT_ID}{self._count}"
        results = self._generate(prompt, params, name, lora_request=answer.adapter)
        return [result.prompt_logprobs async for result in results][-1]

    def _again(self, answer: Answer) -> None:
        if answer.tries >= MOST_TRIES:
            self.skip(INTERRUPTED)
        else:
            self._queue.append(answer)
            self._offered.set()

    def _loaded(self, adapter: Any) -> bool:
        known = self._adapters.get(adapter.lora_name)
        return known is not None and known.lora_int_id == adapter.lora_int_id

    def _tell(self, pick: Pick, agreed: bool) -> None:
        if self._agreement is not None and pick.ticket is not None:
            self._agreement.hear(pick.ticket, agreed)
