"""A rolling restart of two real servers under load: every request is answered, as without it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from ouro_server.draining import CUT
from tests.server.live import KEY, Live, free_port, start

pytestmark = pytest.mark.slow

CLIENTS = 6
RETRIED = (httpx.ConnectError, httpx.RemoteProtocolError, httpx.ReadError)
"""Before a byte of the answer has come, these say that a server took nothing."""


class Balancer:
    """Asks the ready ones of some servers in turn, another one where one takes no request."""

    def __init__(self, urls: list[str]) -> None:
        self.urls, self.ready = urls, dict.fromkeys(urls, False)
        self.running = dict.fromkeys(urls, 0)
        self.answered = dict.fromkeys(urls, 0)
        self.refused = self._turn = 0
        headers = {"Authorization": f"Bearer {KEY}"}
        self.http = httpx.AsyncClient(headers=headers, timeout=120)

    async def probe(self) -> None:
        """Follow who is ready."""
        while True:
            for url in self.urls:
                try:
                    self.ready[url] = (await self.http.get(f"{url}/ready")).status_code == 200
                except httpx.TransportError:
                    self.ready[url] = False
            await asyncio.sleep(0.2)

    async def ask(self, body: dict[str, Any]) -> str:
        """The text of an answer."""
        while True:
            self._turn += 1
            url = self.urls[self._turn % len(self.urls)]
            if not self.ready[url]:
                await asyncio.sleep(0.01)
                continue
            self.running[url] += 1
            try:
                text = await self._post(url, body)
            finally:
                self.running[url] -= 1
            if text is not None:
                self.answered[url] += 1
                return text
            self.refused += 1

    async def _post(self, url: str, body: dict[str, Any]) -> str | None:
        """The answer of one server; None if it did not take the request."""
        request = self.http.build_request("POST", f"{url}/v1/chat/completions", json=body)
        try:
            answer = await self.http.send(request, stream=True)
        except RETRIED:
            return None
        content = (await answer.aread()).decode()
        await answer.aclose()
        if answer.status_code == 503:
            assert json.loads(content)["error"]["type"] == "ServiceUnavailableError"
            assert answer.headers["connection"] == "close"
            return None
        assert answer.status_code == 200, content
        return text_of(content, stream=body.get("stream", False))


def text_of(content: str, *, stream: bool) -> str:
    """What a chat completion says."""
    if not stream:
        return json.loads(content)["choices"][0]["message"]["content"]
    *events, done, rest = content.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


def body(i: int) -> dict[str, Any]:
    """One of eight requests, every other one a stream."""
    kind = i % 8
    asked = {"role": "user", "content": f"Count from {kind} and go on for long."}
    options = {"max_tokens": 40 + 20 * kind, "ignore_eos": True, "temperature": 0.0}
    depth = {"exit_threshold": kind / 8}
    return {"model": "ouro-mini", "messages": [asked], "stream": i % 2 == 1, **options, **depth}


class Restarting:
    """A server on a port that stays the same."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._stack = ExitStack()

    def start(self) -> None:
        """Return when it is ready."""
        self.live = self._stack.enter_context(start(port=self.port))

    def stop(self) -> None:
        """Send SIGTERM and return when it has ended well and left nothing."""
        self._stack.close()


def assert_a_second_signal_ends_it(live: Live) -> None:
    """It stops with a stream running, which is told why."""
    long = body(1) | {"max_tokens": 1500}
    with live.http.stream("POST", "/v1/chat/completions", json=long) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith('data: {"id"')
        live.process.terminate()
        while live.http.get("/ready").status_code == 200:
            time.sleep(0.02)
        assert live.http.get("/health").status_code == 200
        began = time.monotonic()
        live.process.terminate()
        *_, error, _, done, _ = lines
        assert json.loads(error.removeprefix("data: "))["error"]["message"] == CUT
        assert done == "data: [DONE]"
    assert live.process.wait(10) == 0
    assert time.monotonic() - began < 5
    assert "Ouro Serve stops: requests that run (1) have 25 s to finish" in live.output()


def test_a_rolling_restart_loses_no_request_and_a_second_signal_ends_at_once() -> None:
    servers = [Restarting(), Restarting()]

    async def run() -> None:
        balancer = Balancer([server.url for server in servers])
        over, starting = threading.Event(), threading.Event()
        probing = asyncio.create_task(balancer.probe())
        expected = [await balancer.ask(body(i)) for i in range(8)]

        async def client(i: int) -> int:
            asked = 0
            while not over.is_set():
                assert await balancer.ask(body(i + asked)) == expected[(i + asked) % 8]
                asked += 1
                # A start is long, and shares the cores with whoever asks.
                await asyncio.sleep(1 if starting.is_set() else 0)
            return asked

        clients = [asyncio.create_task(client(i)) for i in range(CLIENTS)]
        ran = []
        for server in servers:
            await asyncio.sleep(2)
            ran.append(balancer.running[server.url])
            before = balancer.answered[server.url]
            await asyncio.to_thread(server.stop)
            assert balancer.answered[server.url] >= before + ran[-1]
            starting.set()
            await asyncio.to_thread(server.start)
            while not balancer.ready[server.url]:
                await asyncio.sleep(0.05)
            starting.clear()
        await asyncio.sleep(1)
        over.set()
        assert sum(await asyncio.gather(*clients)) + 8 == sum(balancer.answered.values())
        assert min(ran) > 0
        print(f"{balancer.answered}, {balancer.refused} asked again, {ran} ran at SIGTERM")
        probing.cancel()
        await balancer.http.aclose()

    with ExitStack() as stack:
        for server in servers:
            stack.callback(server.stop)
            server.start()
        asyncio.run(run())
        assert_a_second_signal_ends_it(servers[0].live)
