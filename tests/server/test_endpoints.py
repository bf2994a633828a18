"""Our routes on vLLM's app, with handlers that need no engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from ouro_runtime.config import DEPTH_FIELDS
from tests.server.app import BODIES, Seen, assert_refused, build, post
from tests.server.fakes import BOOK, serve
from tests.server.test_depth_fields import BAD

REFUSING = {"/generative_scoring": {"model": "m"}}


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[TestClient, Seen]]:
    app, seen = build(serve(), monkeypatch)
    with TestClient(app) as client:
        yield client, seen


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


@pytest.mark.parametrize("path", [*BODIES, *REFUSING])
def test_a_misspelt_field_inside_xargs_is_refused(
    served: tuple[TestClient, Seen], path: str
) -> None:
    client, seen = served
    body = (BODIES | REFUSING)[path]
    for key in ("exit_treshold", "kv_transfer_params", "x" * 1000):
        answer = post(client, path, body | {"vllm_xargs": {key: 1}})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["param"] == key
        assert key[:90] in error["message"] and "exit_threshold" in error["message"]
        assert len(error["message"]) < 400
    assert not seen.requests


@pytest.mark.parametrize("path", BODIES)
def test_keys_inside_xargs_that_something_reads_pass(
    served: tuple[TestClient, Seen], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = served
    known = {"forced_depths": [1, 2], "min_loops": 1, "session_id": "a"}
    assert post(client, path, BODIES[path] | {"vllm_xargs": known}).status_code == 418
    app, _ = build(replace(serve(), known_xargs=False), monkeypatch)  # logits processors of its own
    own = {"vllm_xargs": {"ngram_size": 3}}
    assert post(TestClient(app), path, BODIES[path] | own).status_code == 418


@pytest.mark.parametrize("path", BODIES)
def test_good_values_reach_vllms_handler(served: tuple[TestClient, Seen], path: str) -> None:
    client, seen = served
    controls = {"exit_threshold": 1.5, "min_loops": 2, "max_loops": 3, "exit_mode": "exact"}
    controls["exit_rule"] = "delta"
    assert post(client, path, BODIES[path] | controls).status_code == 418
    assert post(client, path, BODIES[path] | {"vllm_xargs": controls}).status_code == 418
    for request in seen.requests:
        assert {k: getattr(request, k) for k in DEPTH_FIELDS} == controls


EFFORTS = {
    "/v1/chat/completions": {"reasoning_effort": "low"},
    "/v1/completions": {"reasoning_effort": "low"},
    "/v1/responses": {"reasoning": {"effort": "low"}},
    "/v1/chat/completions/batch": {"reasoning_effort": "low"},
    "/v1/messages": {"output_config": {"effort": "low"}},
}


@pytest.mark.parametrize("path", BODIES)
def test_every_intent_reaches_vllms_handler(served: tuple[TestClient, Seen], path: str) -> None:
    client, seen = served
    for intent in ({}, {"model": "m@fast"}, EFFORTS[path], {"depth_preset": "fast"}):
        assert post(client, path, BODIES[path] | intent).status_code == 418
    resolved = [request.resolved for request in seen.requests]
    assert [r.source for r in resolved] == ["default", "alias", "reasoning_effort", "preset"]
    assert [r.params.exit_threshold for r in resolved] == [1.0, 0.3, 0.3, 0.3]


@pytest.mark.parametrize("path", BODIES)
def test_contradictions_are_refused(served: tuple[TestClient, Seen], path: str) -> None:
    client, seen = served
    two_presets = {"model": "m@fast", "depth_preset": "full"}
    assert_refused(post(client, path, BODIES[path] | two_presets), "depth_preset")
    two_values = {"exit_threshold": 0.5, "depth_preset": "full"}
    assert_refused(post(client, path, BODIES[path] | two_values), "exit_threshold")
    assert not seen.requests


@pytest.mark.parametrize("field", ["return_depths", "return_exit_cdf", "return_loops"])
@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_some_endpoints_cannot_say_anything_of_every_token(
    served: tuple[TestClient, Seen], path: str, field: str
) -> None:
    client, _ = served
    assert_refused(post(client, path, BODIES[path] | {field: True}), field)


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_the_effort_stands_where_its_api_has_it(served: tuple[TestClient, Seen], path: str) -> None:
    client, _ = served
    answer = post(client, path, BODIES[path] | {"reasoning_effort": "low"})
    assert_refused(answer, "reasoning_effort")


@pytest.mark.parametrize(
    ("path", "said", "name"),
    [
        ("/v1/messages", {"output_config": {"effort": "minimal"}}, "output_config.effort"),
        ("/v1/responses", {"reasoning": {"effort": "minimal"}}, "reasoning.effort"),
        ("/v1/completions", {"reasoning_effort": "minimal"}, "reasoning_effort"),
    ],
)
def test_an_effort_that_is_not_set_up_is_called_as_its_api_calls_it(
    path: str, said: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    efforts = {"low": "fast"}
    app, _ = build(serve(replace(BOOK, efforts=efforts)), monkeypatch)
    assert_refused(post(TestClient(app), path, BODIES[path] | said), name)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    ("field", "value"),
    [("reasoning_effort", "enormous"), ("session_id", 3), ("max_tokens", "x"), ("n", [1])],
)
def test_an_invocation_names_the_field_that_is_wrong(
    served: tuple[TestClient, Seen], path: str, field: str, value: Any
) -> None:
    """vLLM takes a chat that is wrong for a completion without a prompt."""
    client, seen = served
    answers = [post(client, to, BODIES[path] | {field: value}) for to in (path, "/invocations")]
    for answer in answers:
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"].removeprefix("body.") == field
    assert answers[0].json() == answers[1].json()
    assert not seen.requests
    for good in (BODIES[path], {k: v for k, v in BODIES[path].items() if k != "model"}):
        assert post(client, "/invocations", good).status_code == 418


@pytest.mark.parametrize("path", REFUSING)
def test_endpoints_that_know_no_depth_refuse_it(served: tuple[TestClient, Seen], path: str) -> None:
    client, _ = served
    for extra in ({"exit_threshold": 0.5}, {"vllm_xargs": {"exit_threshold": 0.5}}):
        assert_refused(post(client, path, REFUSING[path] | extra), "exit_threshold")
    for extra in ({"depth_preset": "fast"}, {"priority_class": "batch"}):
        assert_refused(post(client, path, REFUSING[path] | extra), *extra)
    assert_refused(post(client, path, REFUSING[path] | {"model": "m@fast"}), "model")

    # Without depth it is vLLM's: its handler answers, or looks for the engine that is not here.
    with suppress(AttributeError):
        assert "knows no depth" not in post(client, path, REFUSING[path]).text


def test_depth_inside_a_requests_sampling_parameters_is_refused_too(
    served: tuple[TestClient, Seen],
) -> None:
    client, _ = served
    for extra, name in (({"exit_threshold": 0.5}, "exit_threshold"), ({"exit_mod": 1}, "exit_mod")):
        body = REFUSING["/generative_scoring"] | {"sampling_params": {"extra_args": extra}}
        answer = post(client, "/generative_scoring", body)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == name


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
    names = ("Chat", "Completion", "Responses", "Batch", "Messages")
    for path, name in zip(BODIES, names, strict=True):
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
