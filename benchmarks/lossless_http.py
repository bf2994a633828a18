"""Drafts over HTTP: held-out problems of ouro-mini, by one client and by 32.

    python -m benchmarks.lossless_http [--rounds 5]

The same questions with the default, lossless, and at full depth without drafts, in turn on one
server. Rates are tokens per second of all clients, prefill included; answers are compared first.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks.engines import MINI, ROOT
from benchmarks.http_clients import CLIENTS, server
from benchmarks.load_client import MAX_TOKENS, Question, questions, session
from benchmarks.report import print_table

FAMILIES = ("sum", "mod", "chain", "cups")
ASKED = {1: 48, CLIENTS: 384}
"""Clients -> questions a round."""

SETTINGS: dict[str, dict[str, Any]] = {"lossless": {}, "full": {"exit_mode": "skip"}}
RESULTS = ROOT / "benchmarks" / "results" / "lossless-http.json"


async def run(
    address: str, asked: Sequence[Question], clients: int, fields: dict[str, Any]
) -> tuple[list[str], list[dict[str, Any]], float]:
    """Answers in the order of the questions, `usage` of each, and seconds."""
    answers: list[Any] = [None] * len(asked)
    queue = iter(enumerate(asked))

    async def client(http: Any) -> None:
        for place, question in queue:
            body = {"prompt": question.prompt, "max_tokens": MAX_TOKENS, "temperature": 0}
            async with http.post("/v1/completions", json=body | fields) as response:
                assert response.status == 200, await response.text()
                answers[place] = await response.json()

    began = time.perf_counter()
    async with session(address, 300) as http:
        await asyncio.gather(*(client(http) for _ in range(clients)))
    seconds = time.perf_counter() - began
    texts = [answer["choices"][0]["text"] for answer in answers]
    return texts, [answer["usage"] for answer in answers], seconds


def measure(address: str, clients: int, rounds: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """One table row.

    Raises:
        AssertionError: if an answer is not the same in every round and setting.
    """
    asked = questions(ASKED[clients], tokenizer, seed=clients, families=FAMILIES)
    rates: dict[str, list[float]] = {name: [] for name in SETTINGS}
    texts: list[str] | None = None
    made = right = 0
    for turn in range(-1, rounds):
        for name in list(SETTINGS) if turn % 2 else list(reversed(SETTINGS)):
            said, usages, seconds = asyncio.run(run(address, asked, clients, SETTINGS[name]))
            texts = texts or said
            assert said == texts, f"{name}: {sum(map(str.__ne__, said, texts))} answers differ"
            if turn >= 0:
                rates[name].append(sum(u["completion_tokens"] for u in usages) / seconds)
                made += sum(u["depth"]["drafts_made"] for u in usages)
                right += sum(u["depth"]["drafts_right"] for u in usages)
    pairs = zip(rates["lossless"], rates["full"], strict=True)
    return {
        "clients": clients,
        "answers": len(asked),
        "equal": True,
        "right": sum(q.problem.verify(text) for q, text in zip(asked, texts or [], strict=True)),
        **{f"{name}_tokens_per_second": statistics.median(rates[name]) for name in SETTINGS},
        "over_full": statistics.median(mine / full for mine, full in pairs),
        "drafts_right": right / max(1, made),
        "rounds": rates,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(MINI / "tokenizer.json"))
    with server(MINI, "float32") as (address, _):
        rows = [measure(address, clients, options.rounds, tokenizer) for clients in ASKED]
    print_table(
        ("clients", "lossless, tokens/s", "full depth", "over full", "drafts right"),
        [
            (
                row["clients"],
                f"{row['lossless_tokens_per_second']:.0f}",
                f"{row['full_tokens_per_second']:.0f}",
                f"{row['over_full']:.2f}",
                f"{row['drafts_right']:.1%}",
            )
            for row in rows
        ],
    )
    options.output.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
