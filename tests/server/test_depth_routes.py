"""`/v1/depth`: what it shows, who may change it, and what a change does to the next request."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from ouro_runtime.config import DepthError
from ouro_server.depth_routes import check_rule_of, depth_info
from ouro_server.plugin import list_aliases, why_fixed
from ouro_server.presets import PresetBook
from ouro_server.served import ServedDepth
from tests.server.app import BODIES, Seen, assert_refused, build, post
from tests.server.fakes import LOOPS, serve

BOOK = PresetBook.parse(
    {
        "presets": {"quick": {"exit_threshold": 0.2, "max_loops": 3, "description": "Drafts."}},
        "reasoning_effort": {"low": "quick"},
        "priority_classes": {"paying": {"floor": 0.9}, "batch": {"floor": 0.1}},
        "default_priority_class": "batch",
    },
    LOOPS,
)
CHAT = "/v1/chat/completions"


@pytest.fixture
def depth() -> ServedDepth:
    return serve(BOOK)


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def client(depth: ServedDepth, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> Any:
    app, _ = build(depth, monkeypatch)
    app.state.openai_serving_chat = seen
    with TestClient(app) as client:
        yield client


@pytest.mark.parametrize("drafts", [True, False])
def test_depth_says_whether_there_are_drafts(depth: ServedDepth, drafts: bool) -> None:
    assert depth_info(replace(depth, drafts=drafts)).drafts is drafts


BUILT_IN = {
    "exit_threshold": 1.0,
    "min_loops": 1,
    "max_loops": 4,
    "exit_mode": "skip",
    "exit_rule": "gate",
}


def test_depth_shows_everything_a_client_may_ask_for(client: TestClient) -> None:
    shown = client.get("/v1/depth").json()
    controller, agreement = shown.pop("controller"), shown.pop("agreement")
    assert controller["active"] is agreement["active"] is False
    assert shown == {
        "object": "depth",
        "model": "m",
        "loops": 4,
        "modes": ["auto", "skip", "exact", "shared", "lossless"],
        "pages_per_token": {"auto": 4, "skip": 4, "exact": 4, "shared": 1, "lossless": 4},
        "rules": {
            "gate": {"most": 1.0, "off": 1.0},
            "margin": {"most": 1.0, "off": 1.0},
            "delta": {"most": 2.0, "off": 0.0},
        },
        "return_loops": True,
        "drafts": True,
        "audit": 0.0,
        "gave_way": [],
        "defaults": BUILT_IN,
        "presets": {
            "quick": {
                "description": "Drafts.",
                "exit_threshold": 0.2,
                "min_loops": None,
                "max_loops": 3,
                "exit_mode": None,
                "exit_rule": "gate",
            }
        },
        "reasoning_effort": {"low": "quick"},
        "aliases": {"m@quick": "quick"},
        "priority_classes": {
            "paying": {"floor": 0.9, "exit_threshold": 1.0},
            "batch": {"floor": 0.1, "exit_threshold": 1.0},
        },
        "default_priority_class": "batch",
    }


def test_a_change_is_shown_and_applies_to_the_next_request(client: TestClient, seen: Seen) -> None:
    answer = client.put("/v1/depth", json={"exit_threshold": 0.4, "min_loops": 2})
    assert answer.status_code == 200
    assert answer.json() == client.get("/v1/depth").json()
    now = answer.json()["defaults"]
    assert now == BUILT_IN | {"exit_threshold": 0.4, "min_loops": 2}
    assert post(client, CHAT, BODIES[CHAT]).status_code == 418
    assert seen.requests[0].resolved.controls() == now
    assert seen.requests[0].resolved.source == "default"


def test_what_is_shown_is_what_a_steered_request_gets(
    client: TestClient, depth: ServedDepth, seen: Seen
) -> None:
    depth.defaults.steer({"batch": 0.3, "paying": 0.95})
    shown = client.get("/v1/depth").json()
    assert shown["defaults"]["exit_threshold"] == 0.3
    assert shown["priority_classes"]["paying"]["exit_threshold"] == 0.95
    post(client, CHAT, BODIES[CHAT])
    post(client, CHAT, BODIES[CHAT] | {"priority_class": "paying"})
    assert [r.resolved.params.exit_threshold for r in seen.requests] == [0.3, 0.95]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"min_loops": 2, "exit_threshold": 2}, "exit_threshold"),
        ({"min_loops": 2, "max_loops": 5}, "max_loops"),
        ({"min_loops": 2, "exit_mode": "x" * 10**5}, "exit_mode"),
        ({"min_loops": 2, "treshold": 1}, "treshold"),
        ({"exit_rule": "delta"}, "exit_threshold"),
        ({"exit_rule": "x", "exit_threshold": 0.5}, "exit_rule"),
        ({"exit_rule": {}, "exit_threshold": 0.5}, "exit_rule"),
    ],
)
def test_a_wrong_change_is_refused_whole(client: TestClient, fields: dict, param: str) -> None:
    before = client.get("/v1/depth").json()
    answer = client.put("/v1/depth", json=fields)
    assert_refused(answer, param)
    assert len(answer.json()["error"]["message"]) < 400
    assert client.get("/v1/depth").json() == before


@pytest.mark.parametrize("content", ["[]", "3", "null", '"x"', "{"])
def test_a_body_that_is_no_object_is_refused(client: TestClient, content: str) -> None:
    headers = {"content-type": "application/json"}
    answer = client.put("/v1/depth", content=content, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("keys", "processes", "status", "reason"),
    [(None, 1, 403, "--api-key"), ([""], 1, 403, "--api-key"), (["k"], 2, 409, "2 API processes")],
)
def test_a_server_that_must_not_be_changed_says_why(
    keys: list[str] | None,
    processes: int,
    status: int,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    app, _ = build(serve(BOOK, fixed=why_fixed(Namespace(api_key=keys), processes)), monkeypatch)
    with TestClient(app) as client:
        answer = client.put("/v1/depth", json={"exit_threshold": 0.4})
        assert answer.status_code == status
        assert reason in answer.json()["error"]["message"]
        assert client.get("/v1/depth").json()["defaults"]["exit_threshold"] == 1.0


def test_a_key_from_the_environment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "k")
    assert why_fixed(Namespace(api_key=None), 1) is None


@pytest.mark.parametrize(
    ("served", "said"),
    [
        ({"reads_loops": False}, "not supported on CUDA yet"),
        ({"steering": object()}, "must stay gate: this server's target"),
    ],
)
def test_a_default_rule_that_this_server_cannot_have_is_refused(
    depth: ServedDepth, served: dict[str, Any], said: str
) -> None:
    fields = {"exit_rule": "margin", "exit_threshold": 0.5}
    check_rule_of(depth, fields)
    check_rule_of(replace(depth, **served), {"exit_rule": "gate", "exit_threshold": 0.5})
    with pytest.raises(DepthError, match=said) as refusal:
        check_rule_of(replace(depth, **served), fields)
    assert refusal.value.param == "exit_rule"


def test_an_engine_that_reads_no_loops_offers_the_gate_alone(depth: ServedDepth) -> None:
    shown = depth_info(replace(depth, reads_loops=False))
    assert list(shown.rules) == ["gate"] and not shown.return_loops


def test_a_model_without_loops_has_no_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    app, _ = build(None, monkeypatch)
    with TestClient(app) as client:
        assert client.get("/v1/depth").status_code == 404
        assert client.put("/v1/depth", json={}).status_code == 404


def test_aliases_are_served_beside_the_models_names(depth: ServedDepth) -> None:
    paths = [SimpleNamespace(name="m", model_path="/m")]

    class Models:
        base_model_paths = paths

        def is_base_model(self, name: str) -> bool:
            return any(path.name == name for path in paths)

    list_aliases(Models(), depth)
    assert [(path.name, path.model_path) for path in paths] == [("m", "/m"), ("m@quick", "/m")]
