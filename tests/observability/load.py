"""Requests of every kind that the metrics tell apart."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.server.live import Live

KINDS: list[dict[str, Any]] = [
    {},
    {"priority_class": "batch"},
    {"depth_preset": "fast"},
    {"depth_preset": "balanced"},
    {"depth_preset": "full"},
    {"reasoning_effort": "low"},
    {"model": "ouro-mini@quality"},
    {"exit_threshold": 0.2},
    {"exit_threshold": 0.9, "min_loops": 2},
    {"depth_preset": "fast", "max_loops": 2},
    {"depth_preset": "fast", "temperature": 0},
    {"depth_preset": "fast", "temperature": 1},
    {"depth_preset": "fast", "temperature": 0, "presence_penalty": 1},
]
AT_ONCE = 8


def drive(live: Live) -> int:
    """Ask everything once plain and once streamed; returns the tokens that came back."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return sum(pool.map(lambda i: ask(live, KINDS[i // 2], i % 2 == 0), range(2 * len(KINDS))))


def ask(live: Live, kind: dict[str, Any], stream: bool) -> int:
    """One bounded request; its tokens."""
    body = {
        "model": live.model,
        "messages": [{"role": "user", "content": "What is 2 + 3?"}],
        "max_tokens": 24,
        "ignore_eos": True,
        **kind,
    }
    if not stream:
        answer = live.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["usage"]["completion_tokens"]
    chunks = 0
    with live.http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            chunks += line.startswith("data: {")
    return chunks
