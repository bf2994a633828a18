"""Audits of a real server: what they count is what a request of one's own can check."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.server.live import LOOPS, Live, Sample, start

pytestmark = pytest.mark.slow

PROMPTS = ["2 + 3 =", "12 + 34 =", "7 mod 3 =", "Who are you?", "What is 904821 + 583397?"]
EARLY = {"exit_threshold": 0.0, "max_loops": 2}
"""So early that answers differ from those of full depth."""
TARGET = 0.8
SECRET = "Quetzalcoatl"
DEADLINE = 30.0


@pytest.fixture(scope="module")
def audited() -> Iterator[Live]:
    with start("--audit", "1", "--target-agreement", str(TARGET)) as server:
        yield server
        # It ends with audits that have not begun, and says nothing of what was asked.
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda prompt: complete(server, prompt, **EARLY), PROMPTS * 4))
        assert SECRET not in server.output()
        assert "audit failed" not in server.output()
        assert "for an audit" not in server.output()


def complete(live: Live, prompt: Any, **fields: Any) -> dict[str, Any]:
    body = {"model": live.model, "prompt": prompt, "max_tokens": 16, "temperature": 0}
    answer = live.http.post("/v1/completions", json=body | {"return_token_ids": True} | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def say(live: Live, question: str) -> dict[str, Any]:
    """A greedy chat of the class that may give up most."""
    body = {
        "model": live.model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 16,
        "temperature": 0,
        "priority_class": "batch",
        "return_depths": True,
    }
    answer = live.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def at_full_depth(live: Live, choice: dict[str, Any]) -> list[dict[str, Any]]:
    """The log-probabilities of an answer's tokens at full depth, by token id, with ranks."""
    whole = choice["prompt_token_ids"] + choice["token_ids"]
    read = complete(live, whole, max_tokens=1, prompt_logprobs=1, exit_mode="skip")
    return read["prompt_logprobs"][len(choice["prompt_token_ids"]) :]


def grown(live: Live, before: dict[Sample, float], name: str, **labels: str) -> float:
    key = (name, *sorted(labels.items()))
    return live.metrics()[key] - before[key]


def wait(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


OWN = {"source": "request", "preset": ""}


def test_greedy_answers_agree_as_far_as_a_pass_of_ones_own_says(audited: Live) -> None:
    before = audited.metrics()
    answers = [complete(audited, prompt, **EARLY) for prompt in PROMPTS]
    wait(lambda: grown(audited, before, "ouro_audited_requests_total", **OWN) == len(PROMPTS))
    right = [
        [entry[str(token)]["rank"] == 1 for token, entry in zip(a["token_ids"], full, strict=True)]
        for a in answers
        for full in [at_full_depth(audited, a)]
    ]
    assert 0 < sum(map(sum, right)) < sum(map(len, right))
    counted = {
        what: grown(audited, before, f"ouro_{what}_total", **OWN)
        for what in ("audited_tokens", "agreeing_tokens", "agreeing_requests")
    }
    assert counted == {
        "audited_tokens": sum(map(len, right)),
        "agreeing_tokens": sum(map(sum, right)),
        "agreeing_requests": sum(map(all, right)),
    }


def test_sampled_answers_differ_by_what_their_log_probabilities_say(audited: Live) -> None:
    before = audited.metrics()
    asked = EARLY | {"temperature": 1.0, "seed": 5, "logprobs": 1}
    answers = [complete(audited, prompt, **asked) for prompt in PROMPTS]
    complete(audited, PROMPTS[0], **asked | {"logprobs": None})
    name = "ouro_audit_logprob_difference"
    wait(lambda: grown(audited, before, f"{name}_count", **OWN) == len(PROMPTS) + 1)
    means = []
    for answer in answers:
        served = answer["logprobs"]["token_logprobs"]
        full = [
            entry[str(token)]["logprob"]
            for token, entry in zip(
                answer["token_ids"], at_full_depth(audited, answer), strict=True
            )
        ]
        means.append(sum(abs(a - b) for a, b in zip(served, full, strict=True)) / len(full))
    # The last request is the first one again, whose log-probabilities only the audit asked for.
    expected = sum(means) + means[0]
    assert expected > 0.1
    assert grown(audited, before, f"{name}_sum", **OWN) == pytest.approx(expected, abs=1e-3)


def test_audits_count_as_nobodys_requests(audited: Live) -> None:
    before = audited.metrics()
    answers = [complete(audited, f"{SECRET} {n} + 3 =", **EARLY) for n in range(6)]
    wait(lambda: grown(audited, before, "ouro_audited_requests_total", **OWN) == 6)
    after = audited.metrics()

    def total(name: str) -> float:
        return sum(after[key] - before[key] for key in before if key[0] == name)

    tokens = sum(len(answer["token_ids"]) for answer in answers)
    assert total("vllm:request_success_total") == 6
    assert total("vllm:prompt_tokens_total") == sum(len(a["prompt_token_ids"]) for a in answers)
    assert total("vllm:generation_tokens_total") == total("ouro_tokens_total") == tokens
    assert total("ouro_requests_total") == 6


def test_penalties_are_not_judged_and_full_depth_is_not_asked_twice(audited: Live) -> None:
    before = audited.metrics()
    complete(audited, PROMPTS[0], presence_penalty=1.0, **EARLY)
    complete(audited, PROMPTS[0], exit_threshold=1.0)
    complete(audited, PROMPTS[0], exit_mode="lossless")
    complete(audited, PROMPTS[1], **EARLY)
    wait(lambda: grown(audited, before, "ouro_audited_requests_total", **OWN) == 1)
    assert grown(audited, before, "ouro_unaudited_requests_total", reason="altered") == 1


def test_audits_prove_lower_thresholds_and_requests_get_them(audited: Live) -> None:
    def told() -> dict[str, Any]:
        return audited.http.get("/v1/depth").json()

    shown = told()
    assert (shown["audit"], shown["agreement"]["target"]) == (1.0, TARGET)
    assert shown["agreement"]["active"] and not shown["controller"]["active"]
    assert {c["proven"] for c in shown["agreement"]["priority_classes"].values()} == {1.0}
    deadline, number = time.monotonic() + DEADLINE, 0
    with ThreadPoolExecutor(4) as pool:
        while shown["agreement"]["priority_classes"]["batch"]["proven"] == 1:
            assert time.monotonic() < deadline, shown["agreement"]
            list(pool.map(lambda i: say(audited, f"What is {i} + 3?"), range(number, number + 16)))
            number += 16
            shown = told()
    wait(lambda: told()["priority_classes"]["batch"]["exit_threshold"] < 1)
    classes = told()["priority_classes"]
    assert classes["premium"]["exit_threshold"] == 1
    batch = ("ouro_agreement_threshold", ("priority_class", "batch"))
    wait(lambda: audited.metrics()[batch] == told()["priority_classes"]["batch"]["exit_threshold"])
    assert min(say(audited, "What is 12 + 34?")["depths"]) < LOOPS
    assert shown["gave_way"] == []
