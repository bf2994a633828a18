"""A real server's metrics by source, and its latency controller at work."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.server.asking import ASK
from tests.server.live import LOOPS, Live, start

pytestmark = pytest.mark.slow

KINDS: dict[tuple[str, str], dict[str, Any]] = {
    ("default", ""): {},
    ("request", ""): {"exit_threshold": 0.4},
    ("request", "fast"): {"depth_preset": "fast", "max_loops": 3},
    ("preset", "balanced"): {"depth_preset": "balanced"},
    ("reasoning_effort", "quality"): {"reasoning_effort": "high"},
    ("alias", "full"): {"model": "ouro-mini@full"},
}
"""(source, preset) -> what a request says to be counted there."""


def streamed_usage(live: Live, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The usage on the last event of a stream that has one."""
    body = body | {"stream": True, "stream_options": {"include_usage": True}}
    with live.http.stream("POST", path, json=body) as answer:
        events = [line[6:] for line in answer.iter_lines() if line.startswith("data: {")]
    return json.loads(events[-1])["usage"]


def usages(live: Live, kind: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """`usage.depth` of chats and completions, plain and streamed, of one and of several choices."""
    common = {"model": live.model, "max_tokens": 6, "temperature": 1.0, "seed": 3} | kind
    chat = common | {"messages": ASK}
    several = common | {"prompt": ["one", "two"], "n": 2}
    for path, body in (("/v1/chat/completions", chat), ("/v1/completions", several)):
        yield live.http.post(path, json=body).json()["usage"]["depth"]
        yield streamed_usage(live, path, body)["depth"]


def test_metrics_by_source_agree_with_the_sum_of_all_usage(live: Live) -> None:
    before = live.metrics()
    requests: Counter[tuple[str, str]] = Counter()
    tokens: Counter[tuple[str, str, str]] = Counter()
    for origin, kind in KINDS.items():
        for depth in usages(live, kind):
            assert (depth["source"], depth["preset"] or "") == origin
            requests[origin] += 1
            for loop, count in depth["histogram"].items():
                tokens[(*origin, loop)] += count
    answer = live.http.post(
        "/v1/responses", json={"model": live.model, "input": "one", "max_output_tokens": 5}
    ).json()["usage"]["depth"]
    requests["default", ""] += 1
    for loop, count in answer["histogram"].items():
        tokens["default", "", loop] += count
    after = live.metrics()
    grown = {key: after[key] - before[key] for key in after if key in before}
    for (source, preset), count in requests.items():
        key = ("ouro_requests_total", ("preset", preset), ("source", source))
        assert grown[key] == count, key
    assert sum(v for k, v in grown.items() if k[0] == "ouro_requests_total") == requests.total()
    by_source = {
        (labels["source"], labels["preset"], labels["depth"]): value
        for (name, *pairs), value in grown.items()
        if name == "ouro_source_tokens_total" and (labels := dict(pairs))
    }
    assert {key: value for key, value in by_source.items() if value} == +tokens
    for loop in range(1, LOOPS + 1):
        total = sum(n for (_, _, depth), n in by_source.items() if depth == str(loop))
        assert total == grown["ouro_tokens_total", ("depth", str(loop))]
    times = "ouro_time_per_output_token_seconds"
    seen = sum(grown[f"{times}_count", ("depth", str(n))] for n in range(1, LOOPS + 1))
    choices_per_round = 1 + 1 + 4 + 4
    assert 0 < seen <= len(KINDS) * choices_per_round + 1


@pytest.fixture(scope="module")
def hurried() -> Iterator[Live]:
    """A server whose target no machine can hold."""
    with start("--target-tpot-ms", "0.01") as server:
        yield server


def ask(live: Live, fields: dict[str, Any]) -> dict[str, Any]:
    body = {
        "model": live.model,
        "messages": ASK,
        "max_tokens": 40,
        "ignore_eos": True,
        "temperature": 0,
    }
    answer = live.http.post("/v1/chat/completions", json=body | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]["depth"]


def test_load_lowers_default_depth_to_the_floors_and_nothing_else(hurried: Live) -> None:
    told = hurried.http.get("/v1/depth").json()
    controller = told["controller"]
    assert controller["active"] is True
    assert controller["target_tpot_ms"] == 0.01
    assert {c["exit_threshold"] for c in told["priority_classes"].values()} == {1.0}
    deadline = time.monotonic() + 60
    with ThreadPoolExecutor(4) as pool:
        while controller["pressure"] < 1 and time.monotonic() < deadline:
            list(pool.map(lambda _: ask(hurried, {}), range(8)))
            told = hurried.http.get("/v1/depth").json()
            controller = told["controller"]
    assert controller["pressure"] == 1
    assert controller["p95_tpot_ms"] > 0.01
    floors = {name: c["floor"] for name, c in told["priority_classes"].items()}
    in_force = {name: c["exit_threshold"] for name, c in told["priority_classes"].items()}
    assert in_force == floors
    metrics = hurried.metrics()
    for name, floor in floors.items():
        assert metrics["ouro_exit_threshold", ("priority_class", name)] == floor
    assert metrics["ouro_controller_changes_total", ("direction", "down")] >= 4
    batch, premium = (ask(hurried, {"priority_class": c}) for c in ("batch", "premium"))
    assert batch["loops_skipped"] > premium["loops_skipped"]
    for explicit in ({"exit_threshold": 1}, {"depth_preset": "full"}):
        assert ask(hurried, explicit | {"priority_class": "batch"})["loops_skipped"] == 0


def test_depth_returns_once_nobody_asks(hurried: Live) -> None:
    deadline = time.monotonic() + 90
    while pressure(hurried) > 0:
        assert time.monotonic() < deadline
        time.sleep(1)
    assert ask(hurried, {"priority_class": "batch"})["loops_skipped"] == 0


def pressure(live: Live) -> float:
    return live.http.get("/v1/depth").json()["controller"]["pressure"]
