"""The server that a storm goes over, and what can be seen of it from outside."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.engines import ROOT
from benchmarks.http_clients import wait_for

SEATS = 16
OPTIONS = (
    *("--max-num-seqs", str(SEATS), "--max-model-len", "512", "--enforce-eager"),
    # Room for two requests of full length: a burst is preempted again and again.
    *("--kv-cache-memory-bytes", "8M"),
)
GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
PATIENCE = 60.0
"""Seconds within which any request must have its end."""


@dataclass(frozen=True)
class Held:
    """What a server holds: memory in MiB, file handles and threads of its processes, and the share
    of the K/V pool in use."""

    memory: float
    handles: int
    threads: int
    kv: float


@dataclass
class Stormed:
    """A running server.

    Attributes:
        url, model: where, and the name it serves. process: the server.
        folder: its temporary files. log: what it printed.
    """

    url: str
    model: str
    process: subprocess.Popen
    folder: Path
    log: Path

    def client(self, connections: int) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        return httpx.AsyncClient(base_url=self.url, limits=limits, timeout=PATIENCE)

    def metrics(self) -> dict[str, float]:
        """Samples of `/metrics` by name, summed over labels."""
        sums: dict[str, float] = {}
        for family in text_string_to_metric_families(httpx.get(f"{self.url}/metrics").text):
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
        return sums

    def processes(self) -> list[psutil.Process]:
        """The server's and those it started."""
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def held(self) -> Held:
        seen = self.processes()
        return Held(
            memory=sum(p.memory_info().rss for p in seen) / 2**20,
            handles=sum(p.num_fds() for p in seen),
            threads=sum(p.num_threads() for p in seen),
            kv=self.metrics()[GAUGES[2]],
        )

    def left_behind(self) -> list[str]:
        """What lies in its folder for temporary files but what torch compiled, to be used again."""
        kept = "torchinductor_"
        return [p.name for p in self.folder.iterdir() if not p.name.startswith(kept)]

    async def settle(self) -> dict[str, float]:
        """The gauges of what is running, waiting and held, once they are zero or have had a
        minute to be."""
        deadline = time.monotonic() + PATIENCE
        while True:
            metrics = await asyncio.to_thread(self.metrics)
            left = {name: metrics[name] for name in GAUGES if metrics[name]}
            if not left or time.monotonic() > deadline:
                return left
            await asyncio.sleep(0.2)


@contextmanager
def stormed(*options: str) -> Iterator[Stormed]:
    """`ouro-serve` with the shipped checkpoint on a free port of this machine, ended at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "ouro_server", "--port", str(port), *OPTIONS, *options]
    paths = [ROOT, ROOT / "kernels", ROOT / "server", os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(p) for p in paths if p)}
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_KVCACHE_SPACE", "VLLM_LOGGING_LEVEL"):
        environment.pop(name, None)
    with tempfile.TemporaryDirectory() as base:
        folder, log = Path(base) / "tmp", Path(base) / "log"
        folder.mkdir()
        environment["TMPDIR"] = str(folder)
        with log.open("w") as sink:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=sink, stderr=subprocess.STDOUT
            )
        try:
            wait_for(url, process)
            model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
            yield Stormed(url, model, process, folder, log)
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{log.read_text()[-3000:]}") from None
        finally:
            end(process)


def end(process: subprocess.Popen) -> None:
    """Stop a server and whatever it started."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for left in family:
        if left.is_running():
            left.kill()


def describe_machine() -> dict[str, Any]:
    """What the figures were got on."""
    from importlib.metadata import version

    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": names[0] if names else "unknown",
        "cpus": os.cpu_count(),
        "torch": version("torch"),
        "seats": SEATS,
    }
