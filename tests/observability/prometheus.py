"""A real Prometheus on loopback, with the shipped configuration."""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.debian import need
from tests.observability.expressions import CONFIG, RULES
from tests.server.live import free_port

READY_SECONDS = 30


@dataclass
class Prometheus:
    """A running Prometheus and ways to ask it."""

    http: httpx.Client

    def get(self, path: str, **parameters: str) -> Any:
        answer = self.http.get(f"/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def values(self, expression: str) -> list[float]:
        """The expression's values now, without those that are not a number."""
        found = [float(one["value"][1]) for one in self.get("query", query=expression)["result"]]
        return [value for value in found if not math.isnan(value)]

    def wait_for_a_scrape(self) -> None:
        """Return when the target has been read; it is taken up some seconds after the start."""
        deadline = time.monotonic() + READY_SECONDS
        while self.values("up") != [1.0]:
            assert time.monotonic() < deadline, self.get("targets")
            time.sleep(0.2)

    def names(self) -> set[str]:
        """Every metric it has seen."""
        return set(self.get("label/__name__/values"))


def configuration(target: str, seconds: float) -> str:
    """The shipped configuration, scraping `target` every so many seconds."""
    config = yaml.safe_load(CONFIG.read_text())
    interval = f"{int(seconds * 1000)}ms"
    config["global"] = {"scrape_interval": interval, "evaluation_interval": interval}
    config["rule_files"] = [str(RULES)]
    (job,) = config["scrape_configs"]
    (targets,) = job["static_configs"]
    targets["targets"] = [target]
    return yaml.safe_dump(config)


@contextmanager
def start(folder: Path, target: str, seconds: float = 1.0) -> Iterator[Prometheus]:
    """Scrape `target` (host:port) until the block ends; files go into `folder`."""
    (folder / "prometheus.yml").write_text(configuration(target, seconds))
    address = f"127.0.0.1:{free_port()}"
    command = [need("prometheus"), f"--config.file={folder / 'prometheus.yml'}"]
    command += [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}"]
    log = folder / "log"
    with log.open("w") as sink:
        process = subprocess.Popen(command, cwd=folder, stdout=sink, stderr=subprocess.STDOUT)
    try:
        with httpx.Client(base_url=f"http://{address}", timeout=10) as http:
            wait_until_ready(http, process, log)
            yield Prometheus(http)
    finally:
        process.terminate()
        process.wait(30)


def wait_until_ready(http: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if http.get("/-/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"Prometheus did not start:\n{log.read_text()[-5000:]}")
