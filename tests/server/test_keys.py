"""Which routes ask for the API key: all that generate or change anything, whatever vLLM adds."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.entrypoints.launchers.app import build_app
from vllm.plugins import endpoint_plugins

from ouro_server import launch
from ouro_server.plugin import DepthEndpoints
from ouro_server.vllm_api import authenticate

KEY = "a-key"
OPEN = {
    "/detokenize",
    "/docs",
    "/docs/oauth2-redirect",
    "/health",
    "/load",
    "/metrics",
    "/openapi.json",
    "/ping",
    "/playground",
    "/ready",
    "/redoc",
    "/tokenize",
    "/version",
}
"""They generate nothing and change nothing. A new route of vLLM's that is open fails here."""


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    """The app that vLLM builds, with every route that it has for what is served here."""
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    monkeypatch.setattr("vllm.plugins.load_endpoint_plugins", lambda _: [DepthEndpoints()])
    monkeypatch.setattr(endpoint_plugins.interface, "load_endpoint_plugins", None, raising=False)
    # The plugin changes it, for the process.
    monkeypatch.setattr(authenticate, "GUARDED_PREFIX", authenticate.GUARDED_PREFIX[:4])
    args = launch.parse(["--api-key", KEY, "--enable-fault-tolerance"])
    return build_app(args, ("generate", "render"))


def requests(app: FastAPI) -> Iterator[tuple[str, str, str]]:
    """(route, method, path) of everything that can be asked of an app."""
    for route in app.routes:
        path = re.sub(r"{[^}]*}", "x", route.path)
        for method in sorted(getattr(route, "methods", None) or {"GET"}):
            yield route.path, method, path


def test_every_route_asks_for_the_key_but_those_that_only_tell(app: FastAPI) -> None:
    client = TestClient(app, raise_server_exceptions=False)
    answers = {
        (route, method): client.request(method, path).status_code
        for route, method, path in requests(app)
    }
    told = {route for (route, _), status in answers.items() if status != 401}
    assert told == OPEN
    asked = {route for route, _ in answers} - told
    for path in ("/invocations", "/adapters", "/generative_scoring", "/collective_rpc", "/pause"):
        assert path in asked
    key = {"Authorization": f"Bearer {KEY}"}
    for path in ("/invocations", "/generative_scoring"):
        assert client.post(path, json={}, headers=key).status_code != 401
        assert client.post(path, json={}, headers={"Authorization": "Bearer b"}).status_code == 401
