"""A 500 leaves the server only if the server is at fault."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient
from starlette.responses import JSONResponse, StreamingResponse

from ouro_server.errors import STOPPED
from ouro_server.honest_status import HonestStatus, progress_of_request, reads_requests

SHAPES: list[dict[str, Any]] = [
    {"error": {"message": "x", "type": "InternalServerError", "param": None, "code": 500}},
    {"type": "error", "error": {"type": "InternalServerError", "message": "x"}},
    {"message": "x", "id": "1"},
]


def ask(
    fail: Any, *, reading: bool = True, admitted: bool = False, dead: bool = False
) -> tuple[int, Any]:
    """The status and body of an endpoint that fails with `fail`, an exception or an answer."""
    app = FastAPI()
    app.add_middleware(HonestStatus)
    app.state.engine_client = SimpleNamespace(errored=dead)

    @app.post("/x", dependencies=[Depends(reads_requests)] if reading else [])
    async def endpoint() -> Any:
        if admitted:
            progress_of_request().admitted = True
        if isinstance(fail, Exception):
            raise fail
        return fail

    with TestClient(app, raise_server_exceptions=False) as client:
        answer = client.post("/x")
        return answer.status_code, answer.text


@pytest.mark.parametrize("error", [RecursionError("deep"), AttributeError("a"), AssertionError()])
def test_what_is_raised_before_the_engine_has_the_request_is_a_400(error: Exception) -> None:
    status, text = ask(error)
    told = json.loads(text)["error"]
    assert (status, told["code"], told["type"]) == (400, 400, "BadRequestError")
    assert type(error).__name__ in told["message"]


@pytest.mark.parametrize("body", SHAPES)
def test_a_500_answered_before_the_engine_has_the_request_is_a_400(body: dict[str, Any]) -> None:
    status, text = ask(JSONResponse(body, 500))
    told = json.loads(text)
    assert status == 400
    assert told.keys() == body.keys()
    if "error" in body:
        assert told["error"]["type"] == "BadRequestError"
        assert told["error"].get("code") in (None, 400)


def test_the_servers_own_faults_stay_500() -> None:
    body = SHAPES[0]
    assert ask(RuntimeError(), admitted=True)[0] == 500
    assert ask(JSONResponse(body, 500), admitted=True) == (
        500,
        bytes(JSONResponse(body).body).decode(),
    )
    assert ask(RuntimeError(), reading=False)[0] == 500


@pytest.mark.parametrize("fail", [RuntimeError("x"), JSONResponse(SHAPES[0], 500)])
@pytest.mark.parametrize("reading", [True, False])
def test_a_dead_engine_is_a_503(fail: Any, reading: bool) -> None:
    status, text = ask(fail, reading=reading, admitted=True, dead=True)
    told = json.loads(text)["error"]
    assert (status, told["code"], told["type"]) == (503, 503, "ServiceUnavailableError")
    assert told["message"] == STOPPED


def test_other_answers_pass_as_they_are() -> None:
    async def chunks() -> Any:
        for part in (b"a", b"b"):
            yield part

    assert ask(StreamingResponse(chunks())) == (200, "ab")
    assert ask(JSONResponse({"a": 1}, 404)) == (404, '{"a":1}')
