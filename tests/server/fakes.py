"""An engine's outputs and vLLM's handlers, without an engine."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

from vllm.outputs import CompletionOutput, RequestOutput

from ouro_runtime.config import ExitParams, LoopConfig
from ouro_server.presets import SHIPPED, PresetBook
from ouro_server.served import ServedDepth

LOOPS = 4
CONFIG = LoopConfig(LOOPS, ExitParams(1.0, 1, LOOPS, "skip", guided=True))
BOOK = PresetBook.load(SHIPPED, LOOPS)


def serve(book: PresetBook = BOOK, **options: Any) -> ServedDepth:
    """The depth of a model served as "m", with the shipped presets and defaults of its own."""
    return ServedDepth.of(CONFIG, book, ["m"], **options)


def output(
    depths: Sequence[int], text: str = "", index: int = 0, finish: str | None = None, **more: Any
) -> CompletionOutput:
    """One choice's tokens, read out at `depths`; each ran as many loops, CDFs 0.1, 0.2 .."""
    made = CompletionOutput(
        index=index,
        text=text,
        token_ids=list(range(100, 100 + len(depths))),
        cumulative_logprob=None,
        logprobs=None,
        finish_reason=finish,
        **more,
    )
    made.depths = list(depths)
    made.loops_run = list(depths)
    made.drafts = [0] * len(depths)
    made.drafts_dropped = [0] * len(depths)
    made.loops = []
    made.exit_cdf = [[0.1 * loop for loop in range(1, depth + 1)] for depth in depths]
    return made


def result(*outputs: CompletionOutput, prompt: Sequence[int] = (1, 2, 3)) -> RequestOutput:
    """What the engine yields for one request."""
    return RequestOutput(
        request_id="r",
        prompt="prompt",
        prompt_token_ids=list(prompt),
        prompt_logprobs=None,
        outputs=list(outputs),
        finished=all(o.finish_reason for o in outputs),
    )


async def replay(items: Sequence[Any]) -> AsyncIterator[Any]:
    """An async generator of `items`."""
    for item in items:
        yield item


def handler(cls: type, **attributes: Any) -> Any:
    """A serving handler that needs no engine: only what vLLM's generators read is set."""
    made = cls.__new__(cls)
    made.__dict__.update(
        depth=serve(),
        parser_cls=None,
        response_role="assistant",
        enable_auto_tools=False,
        enable_force_include_usage=False,
        enable_log_outputs=False,
        enable_log_deltas=False,
        enable_per_request_metrics=False,
        enable_prompt_tokens_details=False,
        _include_reasoning_tokens_details=False,
        request_logger=None,
        return_tokens_as_token_ids=False,
        system_fingerprint=None,
    )
    made.__dict__.update(attributes)
    return made


async def events(stream: AsyncIterator[str]) -> list[dict[str, Any]]:
    """The JSON of a stream's events, the closing [DONE] checked and left out."""
    lines = [event async for event in stream]
    assert lines[-1] == "data: [DONE]\n\n"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def metadata() -> SimpleNamespace:
    """Where vLLM notes a request's usage."""
    return SimpleNamespace(final_usage_info=None)
