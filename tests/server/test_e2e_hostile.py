"""Wrong input to a real server: a 4xx, before a stream begins, and nothing left running."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from benchmarks.mutations import VALID, encoded, mutated
from tests.server.asking import EARLY, chat
from tests.server.live import Live
from tests.server.test_e2e_service import assert_idle

pytestmark = pytest.mark.slow

HEADERS = {"content-type": "application/json"}
MUTATED = 400
GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
NOWHERE: list[dict[str, Any]] = [
    {"json": {"$ref": "#"}},
    {"json": json.dumps({"$ref": "#"})},
    {
        "json": {
            "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
            "$ref": "#/$defs/a",
        }
    },
    {"json": {"type": "string", "minLength": -1}},
    {"grammar": "root ::= root"},
]
"""Constraints that vLLM lets pass and the engine cannot follow."""


def ask(live: Live, path: str, body: dict[str, Any] | bytes) -> httpx.Response:
    if isinstance(body, dict) and body.get("model") == "m":
        body = body | {"model": live.model}
    method = "PUT" if path == "/v1/depth" else "POST"
    return live.http.request(method, path, content=encoded(body), headers=HEADERS)


SHAPES = (b"[]", b'"a"', b"3", b"null", b"{}", b"{", b"", b"[" * 99_999, b'{"a":' * 99_999)


def test_no_endpoint_at_all_fails_at_a_body_of_another_shape(live: Live) -> None:
    """Of every route the server has, those that nobody thought of included."""
    paths = live.http.get("/openapi.json").json()["paths"]
    asked = 0
    for path, methods in paths.items():
        for method in methods.keys() & {"post", "put", "patch"}:
            for content in SHAPES:
                answer = live.http.request(method, path, content=content, headers=HEADERS)
                assert answer.status_code < 500 or answer.status_code == 501, (path, content[:9])
                asked += 1
    assert asked >= len(VALID) * len(SHAPES)
    assert "/scale_elastic_ep" not in paths
    assert_idle(live)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", GENERATING)
def test_a_constraint_that_leads_nowhere_is_the_clients_error(
    live: Live, path: str, stream: bool
) -> None:
    for constraint in NOWHERE:
        answer = ask(live, path, VALID[path] | {"stream": stream, "structured_outputs": constraint})
        if stream and path == "/v1/responses":  # begins before the engine is asked
            assert '"type":"error","code":"invalid_prompt"' in answer.text, (
                constraint,
                answer.text,
            )
            assert "structured_outputs" in answer.text
        else:
            assert answer.status_code == 400, (constraint, answer.text)
            assert answer.json()["error"]["param"] == "structured_outputs"


def test_a_constraint_with_a_dead_end_further_on_is_the_clients_error_too(live: Live) -> None:
    constraint = {"grammar": 'root ::= "a" b\nb ::= b'}
    for path in GENERATING:
        answer = ask(live, path, VALID[path] | {"structured_outputs": constraint})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, 400)
        stream = ask(live, path, VALID[path] | {"structured_outputs": constraint, "stream": True})
        # An event of the stream, unless the engine was there before the first one.
        assert stream.status_code in (200, 400)
        last = stream.text
        if stream.status_code == 200:
            last = [line for line in last.splitlines() if line.startswith("data: {")][-1]
        assert "structured_outputs" in last
        assert '"code": 400' in last or '"code":400' in last or "invalid_prompt" in last


@pytest.mark.parametrize("stream", [False, True])
def test_the_field_that_became_the_constraint_is_named(live: Live, stream: bool) -> None:
    asked = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"$ref": "#"}}}
    path = "/v1/chat/completions"
    answer = ask(live, path, VALID[path] | {"stream": stream, "response_format": asked})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "response_format"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", GENERATING)
def test_numbers_that_do_not_fit_are_named(live: Live, path: str, stream: bool) -> None:
    fields = ["top_k"] if path == "/v1/responses" else ["top_k", "thinking_token_budget"]
    for field in fields:
        for number in (1e30, 10**30, 2**64):
            answer = ask(live, path, VALID[path] | {"stream": stream, field: number})
            assert answer.status_code == 400, (field, number, answer.text)
            assert field in answer.text


def test_mutated_requests_get_no_5xx_and_leave_nothing(live: Live) -> None:
    before = chat(live, EARLY).choices[0]

    def one(seed: int) -> tuple[int, str, int, str]:
        rng = random.Random(seed)
        path = rng.choice([path for path in VALID if path != "/v1/depth"])
        answer = ask(live, path, mutated(rng, path))
        return seed, path, answer.status_code, answer.text[:300]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(one, range(MUTATED)))
    wrong = [a for a in answers if a[2] >= 500 and a[2] not in (501, 503)]
    assert not wrong
    assert_idle(live)
    assert live.http.get("/health").status_code == 200
    after = chat(live, EARLY).choices[0]
    assert (after.message.content, after.depths) == (before.message.content, before.depths)


def test_mutated_defaults_are_refused_or_taken_back(live: Live) -> None:
    for seed in range(60):
        answer = ask(live, "/v1/depth", mutated(random.Random(seed), "/v1/depth"))
        assert answer.status_code in (200, 400), answer.text
    bounds = {"exit_threshold": 1.0, "min_loops": 1, "max_loops": 4}
    defaults = bounds | {"exit_mode": "auto", "exit_rule": "gate"}
    assert ask(live, "/v1/depth", defaults).json()["defaults"] == defaults
