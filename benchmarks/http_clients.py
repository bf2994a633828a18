"""The HTTP server in front: 32 streaming clients against the same requests on the offline engine.

The two take turns; the server is stopped (SIGSTOP) while the offline engine runs, since an idle
vLLM engine polls. The server has vLLM's own layout: its engine on all cores but one.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.engines import ROOT, Engine, machine, worker_cores
from benchmarks.workload import depth_lists, prompts

CLIENTS, PROMPT, TOKENS, LOOPS = 32, 32, 49, 4
START_TIMEOUT = 600
MEANS = (4.0, 2.5)


@contextmanager
def server(
    model: Path, dtype: str, *options: str, seats: int = CLIENTS
) -> Iterator[tuple[str, int]]:
    """`ouro-serve` on a free port with `seats` seats: its address and process group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [
        *(sys.executable, "-m", "ouro_server", str(model), "--port", str(port)),
        *("--host", "127.0.0.1", "--dtype", dtype, "--max-model-len", "512"),
        *("--max-num-seqs", str(seats), "--max-num-batched-tokens", "4096"),
        *("--no-enable-prefix-caching", "--disable-uvicorn-access-log"),
        *options,
    ]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    # A process group, not a session: Linux shares the cores out by session first, and an engine
    # core that polls has starved the clients for seconds.
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, process_group=0, stdout=subprocess.DEVNULL
    )
    try:
        wait_for(address, process)
        yield address, process.pid
    finally:
        os.killpg(process.pid, signal.SIGCONT)
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(address: str, process: subprocess.Popen) -> None:
    """Return when the server answers.

    Raises:
        RuntimeError: if it ends first, or takes longer than `START_TIMEOUT` seconds.
    """
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}")
        try:
            if httpx.get(f"{address}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(1)
    raise RuntimeError(f"no answer from the server after {START_TIMEOUT} s")


async def ask(client: httpx.AsyncClient, name: str, prompt: list[int], depths: list[int]) -> int:
    """Stream one completion; its number of tokens."""
    body = {
        "model": name,
        "prompt": prompt,
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "vllm_xargs": {"forced_depths": depths},
    }
    tokens = 0
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise RuntimeError((await answer.aread()).decode())
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                usage = json.loads(line[6:]).get("usage")
                tokens = usage["completion_tokens"] if usage else tokens
    return tokens


async def round_over_http(address: str, asked: list[list[int]], depths: list[list[int]]) -> float:
    """Tokens per second of all clients at once."""
    limits = httpx.Limits(max_connections=CLIENTS)
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits) as client:
        name = (await client.get("/v1/models")).json()["data"][0]["id"]
        began = time.perf_counter()
        counts = await asyncio.gather(
            *(ask(client, name, prompt, d) for prompt, d in zip(asked, depths, strict=True))
        )
        seconds = time.perf_counter() - began
    assert counts == [TOKENS] * CLIENTS, counts
    return sum(counts) / seconds


def rows_run(address: str) -> int:
    """Cells that the server says it ran, from `/metrics`; its two ways to count them must agree."""
    samples = [
        sample
        for family in text_string_to_metric_families(httpx.get(f"{address}/metrics").text)
        for sample in family.samples
    ]
    by_loop = sum(sample.value for sample in samples if sample.name == "ouro_cells_total")
    by_pass = sum(sample.value for sample in samples if sample.name == "ouro_pass_rows_sum")
    assert by_loop == by_pass, (by_loop, by_pass)
    return int(by_loop)


def rows_owed(depths: list[list[int]], loops: int) -> int:
    """Cells of one round: prompts run every loop, and later tokens what their depth says."""
    return sum(PROMPT * loops + sum(of_request[1:]) for of_request in depths)


def wait_for_rows(address: str, expected: int) -> None:
    """Return once `/metrics` accounts for exactly so many cells; it may lag an answer by a moment.

    Raises:
        RuntimeError: if it does not within five seconds.
    """
    deadline = time.monotonic() + 5
    while (counted := rows_run(address)) != expected:
        if time.monotonic() > deadline:
            raise RuntimeError(f"/metrics counts {counted} cells, {expected} were asked for")
        time.sleep(0.1)


def measure_http(model: Path, dtype: str, rounds: int, threads: int | None) -> dict[str, Any]:
    """Medians of tokens per second, prefill included, over HTTP and offline, and their ratio.

    In every round `/metrics` must account for exactly the cells that the requests asked for.
    """
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    asked = prompts(CLIENTS, PROMPT, vocab, seed=3)
    options = ("--dtype", dtype, "--max-model-len", "512", "--max-num-seqs", str(CLIENTS))
    rows: list[dict[str, Any]] = []
    with (
        Engine("ours", model, worker_cores(threads), *options) as offline,
        server(model, dtype) as (address, group),
    ):
        described = machine(offline)
        for mean in MEANS:
            depths = depth_lists(mean, TOKENS - 1, CLIENTS)
            extra = [{"forced_depths": d} for d in depths]
            owed = rows_owed(depths, LOOPS)
            rates: dict[str, list[float]] = {"http": [], "offline": []}
            for turn in range(-1, rounds):
                before = rows_run(address)
                over_http = asyncio.run(round_over_http(address, asked, depths))
                wait_for_rows(address, before + owed)
                os.killpg(group, signal.SIGSTOP)
                alone = offline.ask("decode", prompts=asked, tokens=TOKENS, extra=extra)["overall"]
                os.killpg(group, signal.SIGCONT)
                if turn >= 0:
                    rates["http"].append(over_http)
                    rates["offline"].append(alone)
            kept = statistics.median(h / o for h, o in zip(*rates.values(), strict=True))
            row = {
                "clients": CLIENTS,
                "mean_depth": mean,
                "kept": kept,
                "cells": owed,
                "rounds": rates,
            }
            row |= {name: statistics.median(values) for name, values in rates.items()}
            rows.append(row)
            print(
                f"{CLIENTS} clients over HTTP, mean depth {mean:g}: {row['http']:.1f} tokens/s, "
                f"offline {row['offline']:.1f}; kept {kept:.2f}",
                flush=True,
            )
    return {"machine": described, "runs": rows}
