"""Depth by intent on a real server: sources, aliases, and defaults that change while it serves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.server.asking import ASK
from tests.server.live import LOOPS, Live

pytestmark = pytest.mark.slow

FEW: dict[str, Any] = {"max_tokens": 4, "temperature": 0}
PRESETS = ("fast", "balanced", "quality", "full")


def source(usage: Any) -> tuple[str, str | None]:
    return usage.depth["source"], usage.depth["preset"]


def ask(live: Live, model: str = "", **fields: Any) -> Any:
    return live.client.chat.completions.create(
        model=model or live.model, messages=ASK, **FEW | fields
    )


@pytest.fixture
def restored(live: Live) -> Iterator[None]:
    """Whatever a test does to the shared server's defaults is undone."""
    before = live.http.get("/v1/depth").json()["defaults"]
    yield
    assert live.http.put("/v1/depth", json=before).status_code == 200


def test_usage_names_the_source_and_the_preset(live: Live) -> None:
    alias = f"{live.model}@fast"
    assert source(ask(live).usage) == ("default", None)
    assert source(ask(live, alias).usage) == ("alias", "fast")
    assert source(ask(live, alias, reasoning_effort="high").usage) == (
        "reasoning_effort",
        "quality",
    )
    named = {"depth_preset": "full"}
    assert source(ask(live, reasoning_effort="low", extra_body=named).usage) == ("preset", "full")
    refined = {"exit_threshold": 0.5}
    assert source(ask(live, alias, extra_body=refined).usage) == ("request", "fast")


def test_an_alias_is_the_preset_it_names(live: Live) -> None:
    names = [model.id for model in live.client.models.list().data]
    assert names == [live.model, *(f"{live.model}@{preset}" for preset in PRESETS)]
    alias, fields = f"{live.model}@fast", {"return_depths": True}
    aliased = ask(live, alias, extra_body=fields)
    named = ask(live, extra_body=fields | {"depth_preset": "fast"})
    assert aliased.model == alias
    assert named.model == live.model
    assert aliased.choices[0].depths == named.choices[0].depths
    *_, last = ask(live, alias, stream=True, stream_options={"include_usage": True})
    assert (last.model, source(last.usage)) == (alias, ("alias", "fast"))
    assert live.http.post("/tokenize", json={"model": alias, "prompt": "hi"}).status_code == 200
    with pytest.raises(openai.NotFoundError):
        ask(live, f"{live.model}@slow")


def test_completions_and_responses_take_every_intent(live: Live) -> None:
    alias = f"{live.model}@full"
    many = live.client.completions.create(model=alias, prompt=["one", "two"], n=2, max_tokens=2)
    assert (many.model, source(many.usage)) == (alias, ("alias", "full"))
    assert many.usage.depth["loops_skipped"] == 0
    few = {"input": "What is 2 + 3?", "max_output_tokens": 4}
    answer = live.client.responses.create(model=alias, reasoning={"effort": "low"}, **few)
    assert (answer.model, source(answer.usage)) == (alias, ("reasoning_effort", "fast"))
    first, *_, last = live.client.responses.create(model=alias, stream=True, **few)
    assert first.response.model == last.response.model == alias
    assert source(last.response.usage) == ("alias", "full")


@pytest.mark.usefixtures("restored")
def test_changed_defaults_hold_from_the_next_request_on_every_endpoint(live: Live) -> None:
    assert live.http.put("/v1/depth", json={"max_loops": 1}).status_code == 200
    usage = ask(live).usage
    assert usage.depth["histogram"]["1"] == usage.completion_tokens
    before = live.metrics()
    body = {"model": live.model, "max_tokens": 4, "messages": ASK}
    assert live.http.post("/v1/messages", json=body).status_code == 200
    after = live.metrics()
    grown = {d: after[key] - before[key] for d in range(1, LOOPS + 1) for key in [depth_key(d)]}
    assert grown[1] > 0 and not any(grown[d] for d in range(2, LOOPS + 1))


def depth_key(depth: int) -> tuple:
    return ("ouro_tokens_total", ("depth", str(depth)))


def test_only_who_has_the_key_changes_depth(live: Live) -> None:
    assert httpx.put(f"{live.url}/v1/depth", json={"max_loops": 1}).status_code == 401
    refused = live.http.put("/v1/depth", json={"max_loops": LOOPS + 1})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_loops")
