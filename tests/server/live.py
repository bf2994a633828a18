"""A real `ouro-serve` in a process of its own."""

from __future__ import annotations

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

import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import ENVIRONMENT

ROOT = Path(__file__).resolve().parents[2]
KEY = "a-key"
ORIGIN = "http://page.test"
LOOPS = 4
START_SECONDS = 300

Sample = tuple
"""(name, (label, value), ...) of a metric, labels sorted, without the model and the engine."""


@dataclass
class Live:
    """A running server and ways to ask it."""

    url: str
    model: str
    log: Path
    client: openai.OpenAI
    http: httpx.Client
    process: subprocess.Popen

    def output(self) -> str:
        """What the server has printed so far."""
        return self.log.read_text(errors="replace")

    def metrics(self) -> dict[Sample, float]:
        """Every sample of `/metrics`."""
        skipped = ("model_name", "engine")
        return {
            (s.name, *sorted((k, v) for k, v in s.labels.items() if k not in skipped)): s.value
            for family in text_string_to_metric_families(self.http.get("/metrics").text)
            for s in family.samples
        }

    def gauge(self, name: str) -> float:
        """One sample of `/metrics` that has no labels of its own."""
        return self.metrics()[(name,)]


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def environment() -> dict[str, str]:
    """Ours, without what the tests' in-process engines need."""
    kept = {k: v for k, v in os.environ.items() if k not in ENVIRONMENT}
    paths = [ROOT, ROOT / "server", ROOT / "kernels", kept.get("PYTHONPATH", "")]
    return kept | {"PYTHONPATH": os.pathsep.join(str(path) for path in paths if path)}


@contextmanager
def start(*options: str, port: int | None = None, **variables: str) -> Iterator[Live]:
    """Serve the shipped checkpoint until the block ends; raises with the log if it never does.

    Args:
        variables: of its environment.
    """
    port = port or free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        log, scratch = Path(folder) / "log", Path(folder) / "tmp"
        scratch.mkdir()
        command = [sys.executable, "-m", "ouro_server", "--port", str(port), "--api-key", KEY]
        command += ["--enforce-eager", "--max-num-seqs", "16", "--kv-cache-memory-bytes", "128M"]
        command += ["--allowed-origins", f'["{ORIGIN}"]', *options]
        with log.open("w") as sink:
            process = subprocess.Popen(
                command,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=environment() | {"TMPDIR": str(scratch)} | variables,
            )
        try:
            deadline = time.monotonic() + START_SECONDS
            while "Ouro Serve is ready" not in log.read_text(errors="replace"):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"ouro-serve did not start:\n{log.read_text()[-5000:]}")
                time.sleep(0.2)
            http = httpx.Client(
                base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=120
            )
            client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
            with http, client:
                yield Live(url, "ouro-mini", log, client, http, process)
            served = process.poll() is None
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if served:
            assert process.returncode == 0, log.read_text()[-5000:]
            left = left_behind(scratch)
            assert left == [], left


def left_behind(folder: Path) -> list[str]:
    """What a server has left in its folder for temporary files, but for what torch compiled and
    uses again."""
    return [str(p) for p in folder.iterdir() if not p.name.startswith("torchinductor_")]
