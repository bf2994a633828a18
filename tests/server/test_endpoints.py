"""Our routes on vLLM's app, with handlers that need no engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.entrypoints.generate.api_router import register_generate_api_routers
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.plugins import endpoint_plugins

from ouro_runtime.config import DEPTH_FIELDS
from ouro_server.plugin import DepthEndpoints
from ouro_server.served import ServedDepth
from ouro_server.vllm_api import create_error_response
from tests.server.fakes import serve
from tests.server.test_depth_fields import BAD

BODIES = {
    "/v1/chat/completions": {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"model": "m", "prompt": "hi"},
    "/v1/responses": {"model": "m", "input": "hi"},
}
REFUSING = {
    "/v1/chat/completions/batch": {"model": "m", "messages": [[{"role": "user", "content": "x"}]]},
    "/v1/messages": {"model": "m", "max_tokens": 3, "messages": [{"role": "user", "content": "x"}]},
    "/generative_scoring": {"model": "m"},
}


class Seen:
    """A handler that notes the request it is given and answers 418."""

    def __init__(self) -> None:
        self.requests: list[Any] = []

    async def take(self, request: Any, raw_request: Any = None) -> Any:
        self.requests.append(request)
        error = create_error_response("seen")
        error.error.code = 418
        return error

    create_chat_completion = create_completion = create_responses = take


def build(depth: ServedDepth | None, monkeypatch: pytest.MonkeyPatch) -> tuple[FastAPI, Seen]:
    """vLLM's app with our plugin attached the way vLLM attaches it."""
    app, seen = FastAPI(), Seen()
    app.state.args = SimpleNamespace(log_error_stack=False)
    register_generate_api_routers(app)
    monkeypatch.setattr("vllm.plugins.load_endpoint_plugins", lambda _: [DepthEndpoints()])
    endpoint_plugins.interface.attach_endpoint_plugins(app, ("generate",))
    init_exception_handler(app)
    app.state.depth = depth
    for name in ("chat", "completion", "responses"):
        setattr(app.state, f"openai_serving_{name}", seen)
    return app, seen


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[TestClient, Seen]]:
    app, seen = build(serve(), monkeypatch)
    with TestClient(app) as client:
        yield client, seen


def post(client: TestClient, path: str, body: dict[str, Any]) -> Any:
    """POST JSON in which NaN and Infinity survive."""
    headers = {"content-type": "application/json"}
    return client.post(path, content=json.dumps(body), headers=headers)


def assert_refused(answer: Any, field: str) -> None:
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == field
    assert field in error["message"]
    assert error["type"] == "BadRequestError"
    assert error["code"] == 400


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("path", BODIES)
def test_every_bad_value_is_a_400_that_names_the_field(
    served: tuple[TestClient, Seen], path: str, nested: bool
) -> None:
    client, seen = served
    for field, value in BAD:
        extra = {"vllm_xargs": {field: value}} if nested else {field: value}
        assert_refused(post(client, path, BODIES[path] | extra), field)
    assert_refused(post(client, path, BODIES[path] | {"min_loops": 3, "max_loops": 2}), "min_loops")
    assert not seen.requests
    assert post(client, path, BODIES[path]).status_code == 418


@pytest.mark.parametrize("path", BODIES)
def test_good_values_reach_vllms_handler(served: tuple[TestClient, Seen], path: str) -> None:
    client, seen = served
    controls = {"exit_threshold": 0.5, "min_loops": 2, "max_loops": 3, "exit_mode": "exact"}
    assert post(client, path, BODIES[path] | controls).status_code == 418
    assert post(client, path, BODIES[path] | {"vllm_xargs": controls}).status_code == 418
    for request in seen.requests:
        assert {k: getattr(request, k) for k in DEPTH_FIELDS} == controls


def test_responses_cannot_return_depths(served: tuple[TestClient, Seen]) -> None:
    client, _ = served
    body = BODIES["/v1/responses"] | {"return_depths": True}
    assert_refused(post(client, "/v1/responses", body), "return_depths")


@pytest.mark.parametrize("path", REFUSING)
def test_endpoints_that_know_no_depth_refuse_it(served: tuple[TestClient, Seen], path: str) -> None:
    client, _ = served
    for extra in ({"exit_threshold": 0.5}, {"vllm_xargs": {"exit_threshold": 0.5}}):
        assert_refused(post(client, path, REFUSING[path] | extra), "exit_threshold")


def test_malformed_requests_are_vllms_to_refuse(served: tuple[TestClient, Seen]) -> None:
    client, _ = served
    headers = {"content-type": "application/json"}
    for content in ("{", "[]", '"text"', '{"messages": 3}'):
        assert client.post(
            "/v1/chat/completions", content=content, headers=headers
        ).status_code in (
            400,
            422,
        )
    assert client.post("/v1/chat/completions", content="{}").status_code in (400, 415)


def test_openapi_shows_the_depth_fields_once_per_route(served: tuple[TestClient, Seen]) -> None:
    client, _ = served
    spec = client.get("/openapi.json").json()
    schemas = spec["components"]["schemas"]
    for path, name in zip(BODIES, ("Chat", "Completion", "Responses"), strict=True):
        body = spec["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert body["$ref"].endswith(f"/Depth{name}Request")
        fields = schemas[f"Depth{name}Request"]["properties"]
        assert all(fields[field]["description"] for field in DEPTH_FIELDS)
    assert "depths" in schemas["DepthChatChoice"]["properties"]
    assert "loops_skipped" in schemas["DepthUsage"]["properties"]
    assert "/v1/depth" in spec["paths"]


def test_a_model_without_loops_is_served_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    app, _ = build(None, monkeypatch)
    with TestClient(app) as client:
        assert client.get("/v1/depth").status_code == 404
        for path, body in BODIES.items():
            assert post(client, path, body).status_code == 418
            assert_refused(post(client, path, body | {"max_loops": 2}), "max_loops")
