"""Our routes on vLLM's app, with handlers that need no engine."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.entrypoints.generate.api_router import register_generate_api_routers
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.sagemaker.api_router import attach_router as attach_sagemaker
from vllm.plugins import endpoint_plugins

from ouro_server.plugin import HANDLERS, DepthEndpoints
from ouro_server.served import ServedDepth
from ouro_server.vllm_api import create_error_response

BODIES = {
    "/v1/chat/completions": {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"model": "m", "prompt": "hi"},
    "/v1/responses": {"model": "m", "input": "hi"},
    "/v1/chat/completions/batch": {"model": "m", "messages": [[{"role": "user", "content": "x"}]]},
    "/v1/messages": {"model": "m", "max_tokens": 3, "messages": [{"role": "user", "content": "x"}]},
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
    create_batch_chat_completion = create_messages = take


def build(depth: ServedDepth | None, monkeypatch: pytest.MonkeyPatch) -> tuple[FastAPI, Seen]:
    """vLLM's app with our plugin attached the way vLLM attaches it."""
    app, seen = FastAPI(), Seen()
    app.state.args = SimpleNamespace(log_error_stack=False)
    attach_sagemaker(app, ("generate",))
    register_generate_api_routers(app)
    monkeypatch.setattr("vllm.plugins.load_endpoint_plugins", lambda _: [DepthEndpoints()])
    endpoint_plugins.interface.attach_endpoint_plugins(app, ("generate",))
    init_exception_handler(app)
    app.state.depth = depth
    for name in HANDLERS:
        setattr(app.state, name, seen)
    return app, seen


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
