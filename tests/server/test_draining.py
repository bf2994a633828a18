"""A server that was told to stop: what runs may finish, what comes is refused, and no later."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, StreamingResponse

from ouro_server.draining import (
    CUT,
    LEAVING,
    Drain,
    Draining,
    build_readiness_router,
    stop_when_drained,
)
from ouro_server.errors import STOPPED
from tests.server.live import free_port

LONG = 30.0


class Slow:
    """An app whose answers wait until they are let go, on a server of its own."""

    def __init__(self) -> None:
        self.drain, self.go = Drain(), asyncio.Event()
        self.left: list[str] = []
        self.app = app = FastAPI()
        app.add_middleware(Draining, drain=self.drain)
        app.include_router(build_readiness_router(self.drain))
        app.state.engine_client = SimpleNamespace(
            errored=False, vllm_config=SimpleNamespace(shutdown_timeout=7)
        )
        app.state.drain = self.drain

        @app.post("/whole")
        async def whole(raw_request: Request) -> Any:
            # As vLLM does: a client that leaves ends the work.
            work = asyncio.ensure_future(self.go.wait())
            leaves = asyncio.ensure_future(raw_request.receive())
            while not (leaves.done() and leaves.result()["type"] == "http.disconnect"):
                await asyncio.wait((work, leaves), return_when=asyncio.FIRST_COMPLETED)
                if work.done():
                    return JSONResponse({"done": True})
                if leaves.result()["type"] != "http.disconnect":
                    leaves = asyncio.ensure_future(raw_request.receive())
            self.left.append("whole")
            return None

        @app.post("/messages")
        @app.post("/stream")
        async def stream() -> StreamingResponse:
            return StreamingResponse(self._events(), media_type="text/event-stream")

    async def _events(self) -> AsyncIterator[str]:
        try:
            yield "data: 1\n\n"
            await self.go.wait()
            yield "data: 2\n\n"
        except asyncio.CancelledError:
            self.left.append("stream")
            raise


def on_server(test: Callable[[Slow, httpx.AsyncClient], Awaitable[None]], grace: float) -> Slow:
    """Run a test beside a server that drains for `grace` seconds; it must have ended by then."""

    async def run() -> Slow:
        slow = Slow()
        port = free_port()
        server = uvicorn.Server(uvicorn.Config(slow.app, port=port, log_level="warning"))
        serving = asyncio.create_task(server._serve())
        while not server.started:
            await asyncio.sleep(0.01)
        slow.app.state.server = server
        stopping = asyncio.create_task(stop_when_drained(slow.app.state, grace))
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=LONG) as http:
            await test(slow, http)
        await asyncio.wait_for(asyncio.gather(serving, stopping), LONG)
        return slow

    return asyncio.run(run())


async def running(slow: Slow, count: int) -> None:
    while slow.drain.running != count:
        await asyncio.sleep(0.01)


def test_what_runs_finishes_and_what_comes_is_refused() -> None:
    async def test(slow: Slow, http: httpx.AsyncClient) -> None:
        assert (await http.get("/ready")).status_code == 200
        jobs = [asyncio.create_task(http.post(path)) for path in ("/whole", "/stream")]
        await running(slow, 2)
        slow.drain.tell()
        for answer in (await http.post("/whole"), await http.get("/ready")):
            assert answer.status_code == 503
            assert answer.json()["error"] == {
                "message": LEAVING,
                "type": "ServiceUnavailableError",
                "param": None,
                "code": 503,
            }
            assert (answer.headers["connection"], answer.headers["retry-after"]) == ("close", "1")
        slow.go.set()
        whole, stream = await asyncio.gather(*jobs)
        assert (whole.status_code, whole.json()) == (200, {"done": True})
        assert whole.headers["connection"] == "close"
        assert stream.text == "data: 1\n\ndata: 2\n\n"

    slow = on_server(test, LONG)
    assert slow.left == []
    assert slow.app.state.engine_client.vllm_config.shutdown_timeout == 0


async def all_cut(slow: Slow, http: httpx.AsyncClient, tell: Callable[[], None]) -> None:
    jobs = [asyncio.create_task(http.post(p)) for p in ("/whole", "/stream", "/messages")]
    await running(slow, 3)
    tell()
    whole, stream, messages = await asyncio.gather(*jobs)
    assert (whole.status_code, whole.json()["error"]["message"]) == (503, CUT)
    first, last, done = stream.text.removesuffix("\n\n").split("\n\n")
    assert (first, done) == ("data: 1", "data: [DONE]")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == 503
    event = messages.text.removesuffix("\n\n").split("\n\n")[1]
    assert event.startswith("event: error\n")
    told = json.loads(event.partition("data: ")[2])
    assert (told["type"], told["error"]["message"]) == ("error", CUT)


def test_what_has_not_finished_in_time_is_told_so() -> None:
    async def test(slow: Slow, http: httpx.AsyncClient) -> None:
        await all_cut(slow, http, slow.drain.tell)

    assert sorted(on_server(test, 0.2).left) == ["stream", "stream", "whole"]


def test_a_second_signal_ends_what_runs() -> None:
    async def test(slow: Slow, http: httpx.AsyncClient) -> None:
        def twice() -> None:
            slow.drain.tell()
            slow.drain.tell()

        await all_cut(slow, http, twice)

    assert len(on_server(test, 10 * LONG).left) == 3


def test_a_server_whose_engine_is_dead_is_not_ready() -> None:
    async def test(slow: Slow, http: httpx.AsyncClient) -> None:
        slow.app.state.engine_client.errored = True
        answer = await http.get("/ready")
        assert (answer.status_code, answer.json()["error"]["message"]) == (503, STOPPED)
        slow.drain.tell()

    on_server(test, LONG)
