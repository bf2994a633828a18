"""A storm in short: hostile requests, clients that leave, a burst, and a killed engine."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from benchmarks import storm
from benchmarks.storm_parts import GROWTH_MIB, Outcome, growth
from benchmarks.storm_server import Held, stormed

START = Held(memory=500, handles=40, threads=30, kv=0.0)


@pytest.mark.slow
def test_the_server_stands_a_short_storm() -> None:
    asked = "--mutated 120 --abandoned 40 --burst 3 --soak 0"
    args = storm.parser().parse_args(asked.split())
    with stormed() as target:
        result = asyncio.run(storm.storm(target, args))
        broken = {part["part"]: part["broken"] for part in result["parts"] if part["broken"]}
        assert not broken, target.log.read_text()[-2000:]
        assert not target.left_behind()
    sent = {part["part"]: part["sent"] for part in result["parts"]}
    assert sent == {
        "mutated requests": 120,
        "abandoned streams": 40,
        "burst": 48,
        "engine killed": 12,
    }
    assert result["parts"][2]["told"]["preemptions"] > 0


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (Held(500 + GROWTH_MIB - 1, 40, 30, 0.0), None),
        (Held(500 + GROWTH_MIB + 1, 40, 30, 0.0), "memory"),
        (Held(500, 41, 30, 0.0), "file handles"),
        (Held(500, 40, 31, 0.0), "threads"),
        (Held(500, 40, 30, 0.01), "K/V"),
    ],
)
def test_what_a_soak_may_leave(end: Held, said: str | None) -> None:
    found = growth(START, end)
    assert (found == []) if said is None else (len(found) == 1 and said in found[0])


def test_the_table_says_what_did_not_hold() -> None:
    held = Outcome("burst", 48, Counter({"as alone": 48})).row()
    broken = Outcome("engine killed", 12, Counter({"500": 1}), broken=["1 requests: 500"]).row()
    soaked = {"start": vars(START), "end": vars(START), "minutes": 1.0}
    machine = {"cpu": "a processor", "cpus": 2, "torch": "2", "seats": 16}
    text = storm.markdown({"machine": machine, "parts": [held, broken], "soak": soaked})
    assert "| burst | 48 | 48 as alone | yes |" in text
    assert "| engine killed | 12 | 1 500 | NO: 1 |" in text
    assert "| end | 500 | 40 | 30 | 0% |" in text
