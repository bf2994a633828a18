"""What no field can be is a 400 that names the field, on every endpoint that takes a body."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from ouro_server.json_body import DEEPEST, check_field
from ouro_server.vllm_api import VLLMValidationError
from tests.server.app import BODIES, Seen, build
from tests.server.fakes import serve

HEADERS = {"content-type": "application/json"}
NESTED = '{"model": "m", "tools": ' + "[" * 5000 + "]" * 5000 + "}"

WRONG: list[tuple[str, str]] = [
    ("top_k", "1" + "0" * 30),
    ("top_k", "9223372036854775808"),
    ("seed", "-9223372036854775809"),
    ("temperature", "NaN"),
    ("temperature", "-Infinity"),
    ("logit_bias", '{"5": Infinity}'),
    ("stop", '["\\ud800"]'),
    ("user", '"a\\udfff"'),
    ("metadata", '{"\\ud800": "x"}'),
    ("structured_outputs", '"text"'),
    ("structured_outputs", "3"),
    ("structured_outputs", "[]"),
    ("structured_outputs", "true"),
    ("messages", "3"),
    ("tools", "true"),
    ("vllm_xargs", "3"),
    ("metadata", "[" * (DEEPEST + 5) + "]" * (DEEPEST + 5)),
]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[TestClient, Seen]]:
    app, seen = build(serve(), monkeypatch)
    with TestClient(app) as client:
        yield client, seen


@pytest.mark.parametrize(("field", "value"), WRONG)
@pytest.mark.parametrize("path", BODIES)
def test_is_a_400_that_names_the_field(
    served: tuple[TestClient, Seen], path: str, field: str, value: str
) -> None:
    client, seen = served
    rest = {k: v for k, v in BODIES.get(path, BODIES["/v1/completions"]).items() if k != field}
    content = json.dumps(rest)[:-1] + f', "{field}": {value}}}'
    answer = client.post(path, content=content, headers=HEADERS)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == field
    assert field in answer.json()["error"]["message"]
    assert not seen.requests


@pytest.mark.parametrize("content", ["[" * 5000, NESTED, '{"n": ' + "9" * 5000 + "}", "{", "\xff"])
@pytest.mark.parametrize("path", BODIES)
def test_a_body_that_cannot_be_read_is_a_400(
    served: tuple[TestClient, Seen], path: str, content: str
) -> None:
    client, _ = served
    answer = client.post(path, content=content.encode("latin-1"), headers=HEADERS)
    assert answer.status_code == 400, answer.text


@pytest.mark.parametrize("content", ["[" * 5000, "{", "[]", "3", '{"exit_threshold": NaN}'])
def test_a_change_of_the_defaults_that_cannot_be_read_is_a_400(
    served: tuple[TestClient, Seen], content: str
) -> None:
    client, _ = served
    client.app.state.depth = serve(fixed=None)  # type: ignore[attr-defined]
    assert client.put("/v1/depth", content=content, headers=HEADERS).status_code == 400


@pytest.mark.parametrize(
    "value",
    [
        None,
        2**63 - 1,
        -(2**63),
        0.5,
        1e30,
        "é\U0001f600",
        list(range(1000)),
        {"maximum": 2**64 - 1},
    ],
)
def test_what_a_field_may_be_passes(value: Any) -> None:
    check_field("field", value)


def test_inside_xargs_the_field_that_stands_there_is_named() -> None:
    with pytest.raises(VLLMValidationError) as refused:
        check_field("vllm_xargs", {"exit_threshold": float("nan")})
    assert refused.value.parameter == "exit_threshold"
