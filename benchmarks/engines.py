"""Engines in processes of their own, and the cores they are bound to."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
MINI = ROOT / "ouro_runtime" / "checkpoints" / "ouro-mini"


def preloads() -> str:
    """The libraries that vLLM preloads into the processes of its CPU workers."""
    import importlib.util

    folders = [
        Path(spec.origin).parent
        for name in ("torch", "vllm")
        if (spec := importlib.util.find_spec(name)) is not None and spec.origin
    ]
    torch, vllm = folders
    gomp = [*torch.parent.glob("torch.libs/libgomp*.so*"), *torch.glob("lib/libgomp*.so*")]
    malloc = sorted((vllm / "libs").glob("libtcmalloc*.so*"))
    return ":".join(str(found[0]) for found in (malloc, gomp) if found)


def worker_cores(threads: int | None = None) -> list[int]:
    """The cores for an engine: like vLLM's own binding, all but one, the last ones.

    Args:
        threads: this many instead.
    """
    allowed = sorted(os.sched_getaffinity(0))
    count = threads or max(1, len(allowed) - 1)
    return allowed[-count:]


def has_bfloat16() -> bool:
    """Whether the processor computes in bfloat16, rather than emulating it."""
    words = set(Path("/proc/cpuinfo").read_text().split())
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & words)


def choose_dtype(asked: str, model: Path) -> str:
    """`asked`, or for `auto` what the checkpoint is stored in; float32 where the processor has no
    bfloat16 arithmetic, whose emulation costs the same for every row and hides what a batch is."""
    stored = json.loads((model / "config.json").read_text())["torch_dtype"]
    if asked != "auto":
        return asked
    return stored if stored == "float32" or has_bfloat16() else "float32"


class Engine:
    """A worker process; `ask` sends a command and waits for the answer.

    Args:
        kind: `ours` or `baseline`. cores: to bind it to.
        options: further options of `benchmarks.worker`. checkout: whose code runs.
    """

    def __init__(
        self,
        kind: str,
        model: str | Path,
        cores: list[int],
        *options: str,
        checkout: Path = ROOT,
    ) -> None:
        self.kind = kind
        threads = str(len(cores))
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "LD_PRELOAD": preloads(),
            "OMP_NUM_THREADS": threads,
            "PYTHONPATH": os.pathsep.join(map(str, (checkout, checkout / "kernels"))),
            "GOMP_CPU_AFFINITY": " ".join(map(str, cores)),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
        }
        if kind == "baseline":
            # Not even our plugin is loaded: what runs is vLLM as it is.
            environment["VLLM_PLUGINS"] = ""
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-W", "ignore", "-m", "benchmarks.worker"),
                *("--engine", kind, "--model", str(model), *options),
            ],
            cwd=checkout,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Run a command of `benchmarks.worker.Worker`.

        Raises:
            RuntimeError: if the worker is gone; what it said is on stderr.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(
                json.dumps({"command": command, **arguments}), file=self.process.stdin, flush=True
            )
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the engine {self.kind!r} died while asked to {command}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def machine(engine: Engine) -> dict[str, Any]:
    """What a figure depends on: processor, cores, threads, versions."""
    described = engine.ask("describe")
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return {
        "cpu": model,
        "cpus": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **described,
    }
