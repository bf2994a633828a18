"""Depth on a stream: what the engine delivers is noted, what vLLM sends is annotated.

vLLM's stream generator pulls one engine output, then yields the server-sent events for it, or none
while a parser holds text back. So tokens wait here until the next event of their choice, and the
event that ends a choice always takes what is left.
"""

import json
from collections.abc import AsyncGenerator, Callable, Collection, Iterable
from contextlib import aclosing
from typing import Any, TypeVar

from ouro_server.resolve import Resolved
from ouro_server.usage import DepthTally, TokenCounts, tokens_of

_DATA = "data: "
T = TypeVar("T")


class DepthLedger:
    """Per choice: tokens delivered by the engine, and those already announced to the client."""

    def __init__(self, loops: int, resolved: Resolved | None = None) -> None:
        self.loops = loops
        self.resolved = resolved
        self._waiting: dict[int, list[tuple[TokenCounts, list[float], list]]] = {}
        self._announced: dict[int, DepthTally] = {}

    def note(self, choice: int, output: Any) -> None:
        """The engine delivered `output` for a choice."""
        loops = output.loops or [[]] * len(output.exit_cdf)
        tokens = zip(tokens_of(output), output.exit_cdf, loops, strict=True)
        self._waiting.setdefault(choice, []).extend(tokens)

    def announce(self, choice: int) -> dict[str, list[Any]]:
        """What a choice may say of its tokens not announced before, in order, by key."""
        waiting = self._waiting.pop(choice, [])
        self.tally(choice).add(counts for counts, *_ in waiting)
        return {
            "depths": [counts.depth for counts, *_ in waiting],
            "drafts": [counts.draft for counts, *_ in waiting],
            "exit_cdf": [cdf for _, cdf, _ in waiting],
            "loops": [loops for *_, loops in waiting],
        }

    def tally(self, choice: int) -> DepthTally:
        """What was announced of one choice."""
        return self._announced.setdefault(choice, DepthTally(self.loops))

    def total(self) -> DepthTally:
        """Everything delivered, announced or not."""
        total = DepthTally(self.loops)
        for tally in self._announced.values():
            total.merge(tally)
        for waiting in self._waiting.values():
            total.add(counts for counts, *_ in waiting)
        return total


async def noting(
    results: AsyncGenerator[T, None],
    ledger: DepthLedger,
    outputs: Callable[[T], Iterable[tuple[int, Any]]],
) -> AsyncGenerator[T, None]:
    """`results`, unchanged; `outputs` names the (choice, output) pairs of each for the ledger."""
    async with aclosing(results):
        async for result in results:
            for choice, output in outputs(result):
                ledger.note(choice, output)
            yield result


async def annotating(
    events: AsyncGenerator[str, None], ledger: DepthLedger, keys: Collection[str]
) -> AsyncGenerator[str, None]:
    """vLLM's server-sent events with `keys` of every token on the choices, and `usage.depth`."""
    async with aclosing(events):
        async for event in events:
            yield annotate(event, ledger, keys)


def annotate(event: str, ledger: DepthLedger, keys: Collection[str]) -> str:
    """One server-sent event; anything but a chunk with choices passes unchanged."""
    if not event.startswith(_DATA + "{"):
        return event
    chunk = json.loads(event[len(_DATA) :])
    if "choices" not in chunk:
        return event
    for choice in chunk["choices"]:
        if _carries_tokens(choice):
            said = ledger.announce(choice["index"])
            choice |= {key: said[key] for key in keys}
    if chunk.get("usage"):
        choices = chunk["choices"]
        tally = ledger.tally(choices[0]["index"]) if choices else ledger.total()
        chunk["usage"]["depth"] = tally.usage(ledger.resolved).model_dump()
    elif not keys:
        return event
    return f"{_DATA}{json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _carries_tokens(choice: dict[str, Any]) -> bool:
    """False for the chunks that vLLM sends before the first token (a chat's role, an echo).

    It sets `token_ids`, if only to null, on all others.
    """
    return "token_ids" in choice
