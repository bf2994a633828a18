"""A server that was told to stop lets running requests finish, and takes no more.

vLLM's engine can wait for what it has (`--shutdown-timeout`), but its server then answers new
requests with an abort, and loses the last tokens of old ones: it stops listening to an engine that
has ended. So the wait is here, where requests are, and vLLM stops when none is left.
"""

import asyncio
import json
from typing import Any

from fastapi import APIRouter, Request
from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ouro_server.errors import STOPPED, unavailable_body
from ouro_server.stopping import SIGNALS

LIVENESS = ("/ping",)
"""What may be posted to a server that stops."""
CLOSING = {"Connection": "close", "Retry-After": "1"}
LEAVING = "this server is stopping and takes no new requests; ask another one, or again later"
CUT = "the server had to stop before this request was finished; ask another one, or again later"

_TO_LEAVE_SECONDS = 5.0
"""For handlers that were told that their client has left."""


class Drain:
    """What runs on a server, and whether it takes more.

    Attributes:
        stopping: it does not.
        running: HTTP requests that are being handled, but for those that only look.
        told: set when the server was told to stop.
    """

    def __init__(self) -> None:
        self.stopping = False
        self.running = 0
        self.over = asyncio.Event()
        self.told = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def tell(self) -> None:
        """Take no more; told again, end what runs."""
        if self.stopping:
            self.over.set()
        self.stopping = True
        self.told.set()

    def enter(self) -> None:
        """A request begins."""
        self.running += 1
        self._idle.clear()

    def leave(self) -> None:
        """A request has ended."""
        self.running -= 1
        if not self.running:
            self._idle.set()

    async def finish(self, grace: float) -> None:
        """Return when the server was told to stop and nothing runs: after `grace` seconds, or when
        told again, what still runs is ended."""
        await self.told.wait()
        if self.running:
            print(
                f"Ouro Serve stops: requests that run ({self.running}) have {grace:g} s to finish; "
                "a second signal ends them",
                flush=True,
            )
        await _first(self._idle, self.over, within=grace)
        self.over.set()
        await _first(self._idle, within=_TO_LEAVE_SECONDS)


async def _first(*events: asyncio.Event, within: float) -> None:
    """Return when one of the events is set, or time is up."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    await asyncio.wait(waits, timeout=within, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


def take_signals(drain: Drain) -> None:
    """Let SIGTERM and SIGINT tell the drain; until now vLLM's handlers of this event loop had
    them."""
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, drain.tell)


async def stop_when_drained(state: Any, grace: float) -> None:
    """Stop the server once it was told to and has drained.

    Args:
        state: the app's; its server serves.
        grace: seconds that running requests have.
    """
    try:
        await state.drain.finish(grace)
    finally:
        # The engine has nothing left to wait for.
        state.engine_client.vllm_config.shutdown_timeout = 0
        state.server.config.timeout_graceful_shutdown = 1
        state.server.should_exit = True


class Draining:
    """ASGI middleware: counts what runs, and refuses what comes when the server stops.

    When time is up a request's handler is told that its client has left, so that it lets go of the
    engine as it always does; the client is told what happened.
    """

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self.app, self.drain = app, drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] in LIVENESS:
            await self.app(scope, receive, send)
        elif self.drain.stopping:
            await refusal(LEAVING)(scope, receive, send)
        else:
            self.drain.enter()
            try:
                request = _Request(self.drain, scope, receive, send)
                await self.app(scope, request.receive, request.send)
                await request.end()
            finally:
                self.drain.leave()


class _Request:
    """Both ends of a running request."""

    def __init__(self, drain: Drain, scope: Scope, receive: Receive, send: Send) -> None:
        self._drain, self._scope, self._receive, self._send = drain, scope, receive, send
        self._begun = self._streams = self._done = False

    async def receive(self) -> Message:
        """The client's next message, or that it has left when time is up."""
        message = asyncio.ensure_future(self._receive())
        over = asyncio.ensure_future(self._drain.over.wait())
        try:
            await asyncio.wait((message, over), return_when=asyncio.FIRST_COMPLETED)
            return message.result() if message.done() else {"type": "http.disconnect"}
        finally:
            message.cancel()
            over.cancel()

    async def send(self, message: Message) -> None:
        """Pass on the answer; when time is up, only what has begun and is no stream."""
        if message["type"] == "http.response.start":
            if self._drain.over.is_set():
                return
            headers = MutableHeaders(scope=message)
            self._begun = True
            self._streams = headers.get("content-type", "").startswith("text/event-stream")
            if self._drain.stopping:
                headers["Connection"] = "close"
        elif not self._begun or (self._streams and self._drain.over.is_set()):
            return
        self._done = message["type"] == "http.response.body" and not message.get("more_body")
        await self._send(message)

    async def end(self) -> None:
        """Say what became of an answer that time was up for."""
        if not self._drain.over.is_set() or self._done:
            return
        if not self._begun:
            await refusal(CUT)(self._scope, self._receive, self._send)
        elif self._streams:
            event = last_event(self._scope["path"])
            await self._send({"type": "http.response.body", "body": event})


def refusal(message: str) -> JSONResponse:
    """503 in OpenAI's error shape."""
    return JSONResponse(unavailable_body(message), 503, CLOSING)


def last_event(path: str) -> bytes:
    """The event that ends a stream of the endpoint at `path`, in the shape its clients read."""
    error = unavailable_body(CUT)
    if path.endswith("/messages"):
        return f"event: error\ndata: {json.dumps({'type': 'error', **error})}\n\n".encode()
    return f"data: {json.dumps(error)}\n\ndata: [DONE]\n\n".encode()


def build_readiness_router(drain: Drain) -> APIRouter:
    """`GET /ready`. vLLM's `/health` says whether the server lives."""
    router = APIRouter()

    @router.get("/ready", response_class=Response, responses={503: {}})
    async def ready(raw_request: Request) -> Response:
        """Whether new requests are taken."""
        client = raw_request.app.state.engine_client
        if client is not None and client.errored:
            return refusal(STOPPED)
        return refusal(LEAVING) if drain.stopping else Response()

    return router
