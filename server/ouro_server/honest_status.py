"""A 500 says that the server is at fault. Where it is not, the answer says so instead.

Whatever vLLM did not foresee in a request, it answers with 500, raised or returned, by endpoint in
several shapes. This looks at the answer as it leaves: while the engine does not have the request
yet, only the request can be wrong, so it is a 400; with a dead engine it is a 503.
"""

import json
import logging
from collections.abc import Collection
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ouro_server.errors import STOPPED
from ouro_server.vllm_api import create_error_response

_TYPES = {400: "BadRequestError", 503: "ServiceUnavailableError"}

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a request has come.

    Attributes:
        reading: its endpoint is one that reads what clients send.
        admitted: the engine has it.
        fields: names of the fields of its body.
        resolved: what its depth was resolved to; None where its endpoint knows none.
    """

    reading: bool = False
    admitted: bool = False
    fields: Collection[str] = ()
    resolved: Any = None


_progress: ContextVar[Progress] = ContextVar("progress")


async def reads_requests(_: Request) -> None:
    """Dependency of endpoints that do nothing but what the body asks for."""
    progress_of_request().reading = True


def progress_of_request() -> Progress:
    """Of the HTTP request that is being handled; one of its own where there is none."""
    return _progress.get(None) or Progress()


class HonestStatus:
    """ASGI middleware: a 500 that is not the server's fault leaves as what it is."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        progress = Progress()
        _progress.set(progress)

        def instead() -> int | None:
            client = getattr(scope["app"].state, "engine_client", None)
            if client is not None and client.errored:
                return 503
            return 400 if progress.reading and not progress.admitted else None

        reply = _Reply(send, instead)
        try:
            await self.app(scope, receive, reply.send)
        except Exception as error:
            status = instead()
            if reply.started or status is None:
                raise
            logger.warning(
                "%s failed and is answered with %d", scope["path"], status, exc_info=True
            )
            text = f"the request cannot be processed: {type(error).__name__}: {str(error)[:200]}"
            body = create_error_response(text).model_dump()
            await JSONResponse(_as(status, body), status)(scope, receive, send)


@dataclass
class _Reply:
    """Passes an answer on; one that begins with a 500 is held back until it can be restated."""

    pass_on: Send
    instead: Any
    started: bool = False
    _head: Message | None = None
    _body: bytearray = field(default_factory=bytearray)

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            if message["status"] == 500:
                self._head = message
                return
        if self._head is None:
            await self.pass_on(message)
            return
        self._body += message.get("body", b"")
        if not message.get("more_body"):
            head, body = restated(self._head, bytes(self._body), self.instead())
            self._head = None
            await self.pass_on(head)
            await self.pass_on({"type": "http.response.body", "body": body})


def restated(head: Message, body: bytes, status: int | None) -> tuple[Message, bytes]:
    """A JSON error with another status, in the shape it has; unchanged if `status` is None."""
    if status is None:
        return head, body
    try:
        content = json.loads(body)
    except ValueError:
        content = create_error_response("the request cannot be processed").model_dump()
    body = json.dumps(_as(status, content)).encode()
    kept = [(k, v) for k, v in head["headers"] if k.lower() not in (b"content-length",)]
    headers = [*kept, (b"content-length", str(len(body)).encode())]
    return {**head, "status": status, "headers": headers}, body


def _as(status: int, content: Any) -> Any:
    """An error body of any of vLLM's shapes, saying what `status` says."""
    error = content.get("error") if isinstance(content, dict) else None
    if isinstance(error, dict):
        error |= {"type": _TYPES[status]} | ({"code": status} if "code" in error else {})
        error["message"] = error.get("message") or "the request cannot be processed"
        if status == 503:
            error["message"] = STOPPED
    return content
