"""Depth on vLLM's other endpoints: the answers are those of the chats and completions they are."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.asking import ASK, EARLY, FULL
from tests.server.live import Live

pytestmark = pytest.mark.slow

CHAT = "/v1/chat/completions"
OPTIONS = {"max_tokens": 24, "temperature": 0.0}
FORCED = {"vllm_xargs": {"forced_depths": [4, 1, 2]}}
EVERY_WAY: list[dict[str, Any]] = [
    FULL,
    EARLY,
    {"max_loops": 2},
    {"depth_preset": "fast"},
    {"model": "ouro-mini@fast"},
    FORCED,
]


def ask(live: Live, path: str, body: dict[str, Any]) -> Any:
    answer = live.http.post(path, json={"model": live.model} | OPTIONS | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(live: Live, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The objects of a stream."""
    body = {"model": live.model, "stream": True} | OPTIONS | body
    lines = live.http.post(path, json=body).text.splitlines()
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]


def told(usage: dict[str, Any]) -> dict[str, Any]:
    """`usage.depth` without what Messages leave out, since it is null."""
    return {key: value for key, value in usage["depth"].items() if value is not None}


@pytest.mark.parametrize("way", EVERY_WAY, ids=str)
def test_a_message_is_the_chat_it_is(live: Live, way: dict[str, Any]) -> None:
    chat = ask(live, CHAT, {"messages": ASK} | way)
    message = ask(live, "/v1/messages", {"messages": ASK} | way)
    assert message["content"] == [
        {"type": "text", "text": chat["choices"][0]["message"]["content"]}
    ]
    assert message["model"] == chat["model"]
    assert message["usage"]["output_tokens"] == chat["usage"]["completion_tokens"]
    assert message["usage"]["depth"] == told(chat["usage"])
    stream = events(live, "/v1/messages", {"messages": ASK} | way)
    text = "".join(e["delta"].get("text", "") for e in stream if e["type"].endswith("block_delta"))
    assert text == message["content"][0]["text"]
    (last,) = [event for event in stream if event["type"] == "message_delta"]
    assert told(last["usage"]) == message["usage"]["depth"]
    assert stream[0]["message"]["model"] == chat["model"]


def test_the_effort_of_a_message_chooses_its_preset(live: Live) -> None:
    message = ask(live, "/v1/messages", {"messages": ASK, "output_config": {"effort": "low"}})
    said = message["usage"]["depth"]
    assert (said["source"], said["preset"]) == ("reasoning_effort", "fast")
    assert said["mean"] < 4


@pytest.mark.parametrize("way", EVERY_WAY, ids=str)
def test_a_batch_is_the_chats_in_it(live: Live, way: dict[str, Any]) -> None:
    asked = [ASK, [{"role": "user", "content": "Count to nine."}]]
    way = way | {"return_depths": True}
    batch = ask(live, f"{CHAT}/batch", {"messages": asked} | way)
    alone = [ask(live, CHAT, {"messages": messages} | way) for messages in asked]
    for choice, chat in zip(batch["choices"], alone, strict=True):
        (single,) = chat["choices"]
        assert choice["message"]["content"] == single["message"]["content"]
        assert choice["depths"] == single["depths"]
    assert batch["model"] == alone[0]["model"]
    for key in ("loops_run", "loops_skipped"):
        said = batch["usage"]["depth"][key]
        assert said == sum(chat["usage"]["depth"][key] for chat in alone)
    for key in ("source", "preset"):
        assert batch["usage"]["depth"][key] == alone[0]["usage"]["depth"][key]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("way", EVERY_WAY, ids=str)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_an_invocation_is_the_request_it_is(
    live: Live, path: str, way: dict[str, Any], stream: bool
) -> None:
    body = {"messages": ASK} if path == CHAT else {"prompt": "one two"}
    body |= way | {"return_depths": True}

    def essence(path: str) -> Any:
        if not stream:
            answer = ask(live, path, body)
            return answer["choices"][0]["depths"], answer["usage"]["depth"], answer["model"]
        include = {"stream_options": {"include_usage": True}}
        *chunks, last = events(live, path, body | include)
        depths = [d for chunk in chunks for c in chunk["choices"] for d in c.get("depths", [])]
        return depths, last["usage"]["depth"], last["model"]

    assert essence("/invocations") == essence(path)


@pytest.mark.parametrize("extra", [{"max_loops": 9}, {"vllm_xargs": {"max_loops": 9}}])
def test_an_invocation_of_bad_depth_is_refused(live: Live, extra: dict[str, Any]) -> None:
    body = {"model": live.model, "messages": ASK} | extra
    answer = live.http.post("/invocations", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "max_loops")


def test_what_messages_generate_is_counted(live: Live) -> None:
    def counted() -> float:
        key = ("ouro_requests_total", ("preset", "fast"), ("source", "preset"))
        return live.metrics()[key]

    before = counted()
    for stream in (False, True):
        body = {"messages": ASK, "model": live.model, "depth_preset": "fast", "stream": stream}
        live.http.post("/v1/messages", json=OPTIONS | body)
    assert counted() == before + 2
