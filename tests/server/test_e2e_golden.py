"""Every golden case, streamed over HTTP: tokens, depths and log-probabilities."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from ouro_server.checkpoint import shipped
from tests.engine.cases import CHECKPOINTS, Case, golden_cases
from tests.engine.compare import assert_case
from tests.server.live import Live, start

pytestmark = pytest.mark.slow
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
AT_ONCE = 12
"""Streams that are open at the same time."""


def with_tokenizer(checkpoint: str, folder: Path) -> Path:
    """The golden checkpoint beside a tokenizer: a server needs one, whatever its text."""
    weights, tokenizer = Path(CHECKPOINTS[checkpoint]).iterdir(), map(shipped().joinpath, TOKENIZER)
    for source in (*weights, *tokenizer):
        (folder / source.name).symlink_to(source)
    return folder


async def stream(client: httpx.AsyncClient, case: Case, gate: asyncio.Semaphore) -> dict[str, Any]:
    """One case's tokens, depths and log-probabilities, put together from its chunks."""
    body = {
        "model": "golden",
        "prompt": list(case.prompt),
        "max_tokens": len(case.tokens),
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 0,
        "stream": True,
        "return_token_ids": True,
        "return_depths": True,
        **case.depth_fields,
    }
    found: dict[str, Any] = {"tokens": [], "depths": [], "logprobs": []}
    async with gate, client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, (await answer.aread()).decode()
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            for choice in json.loads(line[len("data: ") :])["choices"]:
                found["tokens"] += choice["token_ids"] or []
                found["depths"] += choice.get("depths") or []
                found["logprobs"] += (choice["logprobs"] or {}).get("token_logprobs") or []
    return found


async def stream_all(live: Live, cases: list[Case]) -> list[dict[str, Any]]:
    gate = asyncio.Semaphore(AT_ONCE)
    async with httpx.AsyncClient(
        base_url=live.url, headers=dict(live.http.headers), timeout=300
    ) as client:
        return await asyncio.gather(*(stream(client, case, gate) for case in cases))


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_every_golden_case_comes_out_of_a_stream(checkpoint: str, tmp_path: Path) -> None:
    cases = golden_cases(checkpoint)
    folder = with_tokenizer(checkpoint, tmp_path)
    with start(str(folder), "--served-model-name", "golden", "--max-model-len", "256") as live:
        outputs = asyncio.run(stream_all(live, cases))
    assert len(outputs) == len(cases) > 20
    for case, out in zip(cases, outputs, strict=True):
        assert_case(case, out["tokens"], out["depths"], out["logprobs"])
