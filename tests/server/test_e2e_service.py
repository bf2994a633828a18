"""What a real `ouro-serve` owes its operator: errors, keys, metrics, and clients that leave."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from typing import Any

import httpx
import openai
import pytest

from tests.server.app import BODIES
from tests.server.asking import ASK, DEFAULT, EARLY, FULL, chat
from tests.server.live import KEY, LOOPS, ORIGIN, Live
from tests.server.test_depth_fields import BAD

pytestmark = pytest.mark.slow


def test_beam_search_works_but_takes_no_depth(live: Live) -> None:
    body = BODIES["/v1/completions"] | {"use_beam_search": True, "n": 2, "max_tokens": 3}
    answer = live.http.post("/v1/completions", json=body | {"model": live.model})
    assert answer.status_code == 200
    refused = live.http.post("/v1/completions", json=body | {"exit_threshold": 0.5})
    assert refused.json()["error"]["param"] == "exit_threshold"


def test_models_tokenize_health_and_depth_answer(live: Live) -> None:
    aliases = [f"{live.model}@{preset}" for preset in ("fast", "balanced", "quality", "full")]
    assert [model.id for model in live.client.models.list()] == [live.model, *aliases]
    tokens = live.http.post("/tokenize", json={"model": live.model, "prompt": "hi"}).json()
    assert tokens["count"] >= 1
    assert live.http.get("/health").status_code == 200
    told = live.http.get("/v1/depth").json()
    assert (told["model"], told["loops"]) == (live.model, LOOPS)
    assert told["defaults"]["exit_threshold"] == 1.0


def test_a_wrong_key_is_turned_away(live: Live) -> None:
    stranger = openai.OpenAI(base_url=f"{live.url}/v1", api_key="wrong")
    with pytest.raises(openai.AuthenticationError):
        stranger.chat.completions.create(model=live.model, messages=ASK)
    assert httpx.get(f"{live.url}/v1/depth").status_code == 401


def test_cors_allows_the_configured_origin(live: Live) -> None:
    headers = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    answer = httpx.options(f"{live.url}/v1/chat/completions", headers=headers)
    assert answer.headers["access-control-allow-origin"] == ORIGIN


def test_bad_values_are_400_and_the_server_goes_on(live: Live) -> None:
    before = chat(live, EARLY).choices[0]
    headers = {"content-type": "application/json"}
    for path, body in BODIES.items():
        for field, value in BAD:
            for extra in ({field: value}, {"vllm_xargs": {field: value}}):
                content = json.dumps(body | {"model": live.model, "stream": True} | extra)
                answer = live.http.post(path, content=content, headers=headers)
                assert answer.status_code == 400, (path, extra, answer.text)
                assert answer.json()["error"]["param"] == field
    after = chat(live, EARLY).choices[0]
    assert (after.message.content, after.depths) == (before.message.content, before.depths)


def test_the_official_client_sees_a_bad_request(live: Live) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        chat(live, {"exit_threshold": 2})
    assert refused.value.param == "exit_threshold"


def test_metrics_agree_with_the_sum_of_all_usage(live: Live) -> None:
    before = live.metrics()
    total: Counter[str] = Counter()
    by_depth: Counter[str] = Counter()
    for depth in (DEFAULT, FULL, EARLY):
        for fields in ({}, {"n": 3, "temperature": 1.0}, {"logprobs": True}):
            usage = chat(live, depth, **fields).usage
            total["tokens"] += usage.completion_tokens
            total["run"] += usage.depth["loops_run"]
            total["skipped"] += usage.depth["loops_skipped"]
            by_depth.update(usage.depth["histogram"])
    after = live.metrics()

    def grown(name: str, **labels: str) -> float:
        key = (name, *sorted(labels.items()))
        return after[key] - before[key]

    assert grown("ouro_loops_run_total") == total["run"]
    assert grown("ouro_loops_skipped_total") == total["skipped"]
    # What was dropped with a wrong draft was run as well.
    assert total["run"] + total["skipped"] >= LOOPS * total["tokens"]
    assert grown("vllm:generation_tokens_total") == total["tokens"]
    for loop in range(1, LOOPS + 1):
        assert grown("ouro_tokens_total", depth=str(loop)) == by_depth[str(loop)]
    assert grown("ouro_request_mean_depth_count") == 3 * 5
    assert grown("ouro_step_tokens_sum") >= total["tokens"]
    cells = sum(grown("ouro_cells_total", loop=str(n)) for n in range(1, LOOPS + 1))
    assert cells == grown("ouro_pass_rows_sum")


def assert_idle(live: Live) -> None:
    """No request runs or waits, and none holds a block of the K/V pool."""
    deadline = time.monotonic() + 60
    gauges = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    while any(left := [live.gauge(name) for name in gauges]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == [0, 0, 0]


async def leave(http: httpx.AsyncClient, body: dict[str, Any], chunks: int) -> None:
    """Begin a stream and hang up after some chunks."""
    async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            chunks -= line.startswith("data: ")
            if chunks <= 0:
                return


def test_two_hundred_clients_that_leave_leave_nothing_behind(live: Live) -> None:
    before = chat(live, EARLY).choices[0]

    async def all_leave() -> None:
        limits = httpx.Limits(max_connections=25, max_keepalive_connections=0)
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(
            base_url=live.url, headers=headers, limits=limits, timeout=120
        ) as http:
            jobs = []
            for i in range(200):
                content = f"Say {i} and go on for very long."
                body = {
                    "model": live.model,
                    "messages": [{"role": "user", "content": content}],
                    "max_tokens": 1000,
                    "ignore_eos": True,
                    "stream": True,
                    "return_depths": i % 2 == 0,
                    "exit_threshold": (i % 5) / 4,
                    "n": 1 + i % 2,
                }
                jobs.append(leave(http, body, chunks=1 + i % 7))
            await asyncio.gather(*jobs)

    asyncio.run(all_leave())
    assert_idle(live)
    after = chat(live, EARLY).choices[0]
    assert (after.message.content, after.depths) == (before.message.content, before.depths)


def test_clients_that_do_not_wait_for_an_answer_free_their_requests(live: Live) -> None:
    body = {"model": live.model, "prompt": "one", "max_tokens": 1500, "ignore_eos": True}
    for _ in range(5):
        with pytest.raises(httpx.ReadTimeout):
            live.http.post("/v1/completions", json=body, timeout=0.3)
    assert_idle(live)


def test_the_ready_line_says_where_and_what(live: Live) -> None:
    line = f"Ouro Serve is ready at {live.url} (model {live.model}, T={LOOPS}, exit threshold 1"
    assert line in live.output()
