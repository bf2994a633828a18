"""How long `ouro-serve` takes from the command to the first answer, and what it prints and leaves.

A cold start finds no cache of what torch, vLLM and numba compile, as the first after an install;
warm ones find what the cold one before them left. Bytecode of packages is there, as pip leaves it,
and files are in memory as far as earlier starts read them.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.engines import ROOT
from benchmarks.report import print_table

ASK = {
    "model": "ouro-mini",
    "exit_threshold": 0.5,
    "return_depths": True,
    "messages": [{"role": "user", "content": "What is 904821 + 583397?"}],
}
"""The README's first request."""

ANSWER = "1488218"
PATIENCE = 300.0
POLL = 0.05
KEPT = "torchinductor_"
HEAD = ("start", "ready, s", "first answer, s", "stop, s", "lines printed", "processes", "left")


@dataclass(frozen=True)
class Start:
    """One start: seconds from the command, and from SIGTERM to the end; what it printed; processes
    while it served; processes and files that were there after its end."""

    ready: float
    answer: float
    stop: float
    lines: int
    processes: int
    left: int


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cold", type=int, default=1, help="starts with empty caches (1)")
    parser.add_argument("--warm", type=int, default=3, help="starts after the last of them (3)")
    parser.add_argument("options", nargs="*", help="after --: options of ouro-serve")
    chosen = parser.parse_args(arguments)
    rows = []
    for number in range(chosen.cold):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row("cold", start(Path(folder), chosen.options)))
            if number + 1 == chosen.cold:
                for _ in range(chosen.warm):
                    rows.append(row("warm", start(Path(folder), chosen.options)))
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end")
    print_table(HEAD, rows)


def row(kind: str, seen: Start) -> tuple[object, ...]:
    times = (f"{seconds:.1f}" for seconds in (seen.ready, seen.answer, seen.stop))
    return (kind, *times, seen.lines, seen.processes, seen.left)


def start(folder: Path, options: list[str]) -> Start:
    """Start a server whose caches and temporary files are in `folder`, ask it once, and stop it.

    Raises:
        RuntimeError: with what it printed, unless it answers right and stops with status 0.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    caches, scratch, log = folder / "caches", folder / "tmp", folder / "log"
    scratch.mkdir(exist_ok=True)
    command = [str(Path(sys.executable).with_name("ouro-serve")), "--port", str(port), *options]
    began = time.monotonic()
    with log.open("w") as sink:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(caches, scratch), stdout=sink, stderr=sink
        )
    try:
        ready = wait(process, lambda: "Ouro Serve is ready" in log.read_text()) - began
        wait(process, lambda: ANSWER in ask(port))
        answered = time.monotonic()
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        if process.wait(PATIENCE) != 0:
            raise RuntimeError(f"stopped with status {process.returncode}")
        stopped = time.monotonic()
        alive = psutil.wait_procs(family, timeout=5)[1]
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{error}; it printed:\n{log.read_text()[-3000:]}") from None
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    left = [path for path in scratch.iterdir() if not path.name.startswith(KEPT)]
    lines = len(log.read_text().splitlines())
    return Start(
        ready,
        answered - began,
        stopped - answered,
        lines,
        1 + len(family),
        len(left) + len(alive),
    )


def environment(caches: Path, scratch: Path) -> dict[str, str]:
    """As `make serve` has it, with every cache in a folder of its own."""
    paths = [ROOT, ROOT / "kernels", ROOT / "server", os.environ.get("PYTHONPATH", "")]
    ours = {
        "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path),
        "TMPDIR": str(scratch),
    }
    for name in ("XDG_CACHE_HOME", "VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "NUMBA_CACHE_DIR"):
        ours[name] = str(caches / name.lower())
    return {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | ours


def wait(process: subprocess.Popen, reached: Callable[[], bool]) -> float:
    """The time at which `reached` first holds."""
    deadline = time.monotonic() + PATIENCE
    while not reached():
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}")
        if time.monotonic() > deadline:
            raise RuntimeError("the server did not come up")
        time.sleep(POLL)
    return time.monotonic()


def ask(port: int) -> str:
    """The answer to `ASK`; empty while there is none."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(ASK).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return json.load(answer)["choices"][0]["message"]["content"]
    except (urllib.error.URLError, ConnectionError):
        return ""


if __name__ == "__main__":
    main()
