"""Questions that the end-to-end tests ask, and what every answer must agree on."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.server.live import LOOPS, Live

DEFAULT: dict[str, Any] = {}
"""Every loop, losslessly: where tokens are drafted is the server's to say, and may change."""
FULL: dict[str, Any] = {"exit_mode": "skip"}
"""Every loop, without drafts."""
EARLY: dict[str, Any] = {"exit_threshold": 0.3}
ASK = [{"role": "user", "content": "What is 2 + 3?"}]


def check(depths: list[list[int]], usage: Any, depth: dict[str, Any], mode: str = "skip") -> None:
    """The depths of all choices and `usage.depth` agree with each other and with the request."""
    every = [d for one in depths for d in one]
    told = usage.depth
    assert len(every) == usage.completion_tokens
    assert told["histogram"] == {str(d): Counter(every)[d] for d in range(1, LOOPS + 1)}
    assert told["mean"] == pytest.approx(sum(every) / len(every))
    loops = told["loops_run"] + told["loops_skipped"]
    if depth == DEFAULT:
        assert told["loops_skipped"] == 0
        # What was dropped was run as well.
        assert loops > LOOPS * len(every) or told["drafts_right"] == told["drafts_made"]
        assert told["drafts_right"] <= told["drafts_made"]
    assert loops >= LOOPS * len(every) if depth == DEFAULT else loops == LOOPS * len(every)
    if depth == FULL:
        assert set(every) == {LOOPS}
        assert told["loops_skipped"] == 0
    elif depth != DEFAULT and mode == "skip":
        # The prompt runs every loop that the request may read.
        forced = depth.get("vllm_xargs", {}).get("forced_depths", ())
        deepest = max(forced, default=depth.get("max_loops", LOOPS))
        first = sum(deepest - one[0] for one in depths if one)
        assert told["loops_run"] == sum(every) + first


def chat(live: Live, depth: dict[str, Any], messages: Any = ASK, **fields: Any) -> Any:
    """A chat completion, its depths checked."""
    extra = depth | {"return_depths": True} | fields.pop("extra_body", {})
    fields = {"max_tokens": 16, "temperature": 0} | fields
    answer = live.client.chat.completions.create(
        model=live.model, messages=messages, extra_body=extra, **fields
    )
    check([choice.depths for choice in answer.choices], answer.usage, depth)
    return answer
