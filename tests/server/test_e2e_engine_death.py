"""The engine process is killed under load: everyone is told, and nobody waits."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest

from tests.server.live import KEY, Live, start

pytestmark = pytest.mark.slow

SAID = [{"role": "user", "content": "x"}]
LONG = {"max_tokens": 1500, "max_output_tokens": 1500, "ignore_eos": True}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": SAID} | LONG,
    "/v1/completions": {"prompt": "one"} | LONG,
    "/v1/responses": {"input": "x"} | LONG,
}
PATIENCE = 30
"""Seconds within which every request must have its end."""


def engine_of(live: Live) -> psutil.Process:
    """The engine process of a server that this process started."""
    mine = psutil.Process(os.getpid()).children(recursive=True)
    port = live.url.rsplit(":", 1)[1]
    (server,) = (p for p in mine if "ouro_server" in p.cmdline() and port in p.cmdline())
    return next(p for p in server.children(recursive=True) if "EngineCore" in p.name())


def ask(live: Live, path: str, stream: bool) -> tuple[int, str]:
    body = BODIES[path] | {"model": live.model, "stream": stream}
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(live.url + path, json=body, headers=headers, timeout=PATIENCE)
    return answer.status_code, answer.text


def test_a_killed_engine_is_a_503_and_ends_every_stream() -> None:
    with start() as live, ThreadPoolExecutor(6) as pool:
        asked = {(p, s): pool.submit(ask, live, p, s) for p in BODIES for s in (False, True)}
        while live.gauge("vllm:num_requests_running") < len(asked):
            time.sleep(0.05)
        engine_of(live).send_signal(signal.SIGKILL)
        for (path, stream), answer in asked.items():
            status, text = answer.result(PATIENCE)
            if stream:
                assert status == 200
                assert "503" in text or "service_unavailable" in text, text[-500:]
            else:
                assert status == 503, (path, text)
                assert '"type": "ServiceUnavailableError"' in text

        # From now on: 503, until nobody listens any more.
        deadline = time.monotonic() + PATIENCE
        refused = False
        while not refused and time.monotonic() < deadline:
            try:
                status, _ = ask(live, "/v1/completions", stream=True)
                assert status == 503
            except httpx.TimeoutException:
                raise
            except httpx.TransportError:
                refused = True
        assert refused
