"""The tables of docs/api.md against the server's own account of its fields, in both directions."""

from __future__ import annotations

import re
from typing import Any

import pytest
from fastapi.testclient import TestClient

from ouro_server.presets import EFFORTS, SECTIONS
from ouro_server.resolve import SOURCES
from ouro_server.vllm_api import (
    AnthropicMessagesRequest,
    BatchChatCompletionRequest,
    ChatCompletionRequest,
    ChatCompletionResponseChoice,
    CompletionRequest,
    CompletionResponseChoice,
    ResponsesRequest,
)
from tests.docs.blocks import ROOT
from tests.server.app import build
from tests.server.fakes import serve

TEXT = (ROOT / "docs/api.md").read_text()
REQUESTS = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/chat/completions/batch": BatchChatCompletionRequest,
    "/v1/messages": AnthropicMessagesRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
}


def names(after: str) -> list[str]:
    """The names in the first column of the table that comes first in or after a line."""
    table = re.compile(r"^\|.*\n\|[-|]+\|\n((?:\|.*\n)+)", re.MULTILINE)
    found = table.search(TEXT, TEXT.index(f"\n{after}") + 1)
    assert found is not None
    return re.findall(r"^\| `(\w+)` \|", found[1], re.MULTILINE)


@pytest.fixture(scope="module")
def spec() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        app, _ = build(serve(), patch)
        with TestClient(app) as client:
            return client.get("/openapi.json").json()


def properties(spec: Any, schema: str) -> dict[str, Any]:
    return spec["components"]["schemas"][schema]["properties"]


def request_fields(spec: Any, path: str) -> set[str]:
    body = spec["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return set(properties(spec, body["$ref"].rpartition("/")[2]))


def test_request_fields_are_what_we_add_to_vllms(spec: Any) -> None:
    documented = names("## Request fields")
    added: set[str] = set()
    for path, theirs in REQUESTS.items():
        added |= request_fields(spec, path) - set(theirs.model_fields)
    assert set(documented) == added
    for field in documented:
        not_there = [path for path in REQUESTS if field not in request_fields(spec, path)]
        noted = re.search(rf"^\| `{field}` .*/v1/responses.*/v1/messages", TEXT, re.MULTILINE)
        assert not_there == (["/v1/messages", "/v1/responses"] if noted else [])


def test_usage_fields_are_the_servers(spec: Any) -> None:
    assert names("| `usage.depth` |") == list(properties(spec, "DepthUsage"))


def test_choice_fields_are_what_we_add_to_vllms(spec: Any) -> None:
    for name, theirs in (
        ("DepthChatChoice", ChatCompletionResponseChoice),
        ("DepthCompletionChoice", CompletionResponseChoice),
    ):
        assert set(names("| `choices[i]` |")) == set(properties(spec, name)) - set(
            theirs.model_fields
        )


def test_sources_are_listed_strongest_first(spec: Any) -> None:
    assert tuple(names("| `usage.depth.source` |")) == SOURCES
    assert tuple(properties(spec, "DepthUsage")["source"]["enum"]) == SOURCES


def test_depth_shows_the_documented_fields(spec: Any) -> None:
    shown = list(properties(spec, "DepthInfo"))
    assert shown[:4] == ["object", "model", "loops", "modes"]
    assert names("(shortened here)") == shown[4:]
    assert names("`controller` is the latency") == list(properties(spec, "ControllerInfo"))
    assert names("`agreement` is the target") == list(properties(spec, "ClassAgreement"))


def test_the_presets_file_has_the_documented_sections() -> None:
    assert tuple(names("| section |")) == SECTIONS
    efforts = re.search(r"^\| `reasoning_effort` \| for any of (.*): ", TEXT, re.MULTILINE)
    assert efforts is not None
    assert tuple(re.findall(r"`(\w+)`", efforts[1])) == EFFORTS
