"""The tests that need an NVIDIA GPU: `make gpu-test`. Ends inside nine minutes whatever happens.

The kernels, compiled instead of interpreted; and engines, on the golden data. Each stage is a
pytest process of its own; they run side by side, and whatever still runs when the time is up is
killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 520

TIMED_OUT = 124


def run(command: Sequence[str], seconds: float, output: IO[str] | None = None) -> int:
    """A command's exit status; `TIMED_OUT` if it, and whatever it started, had to be killed."""
    with subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stdout=output, stderr=output
    ) as process:
        try:
            return process.wait(timeout=max(0.0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return TIMED_OUT


def main(arguments: list[str]) -> int:
    """Run both stages with `arguments` for pytest; 1 if one failed or was not finished."""
    import torch

    if not torch.cuda.is_available():
        print("No CUDA device: these tests need one.")
        return 1
    began = time.monotonic()
    pytest = [sys.executable, "-m", "pytest", *arguments]
    stages = {
        "kernels": [*pytest, "tests/kernels"],
        "engines": [*pytest, "-m", "gpu", "tests/gpu"],
    }
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(len(stages)) as pool:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in stages]
        running = [
            pool.submit(run, command, SECONDS, log)
            for command, log in zip(stages.values(), logs, strict=True)
        ]
        closings = []
        for name, log, stage in zip(stages, logs, running, strict=True):
            status = stage.result()
            log.seek(0)
            print(f"\n== {name}\n{log.read()}", flush=True)
            word = {0: "passed", TIMED_OUT: "NOT FINISHED"}.get(status, "FAILED")
            closings.append((word, name))
    print(f"\n== on {torch.cuda.get_device_name()}, {time.monotonic() - began:.0f} s")
    for word, name in closings:
        print(f"{word}  {name}")
    return 0 if all(word == "passed" for word, _ in closings) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
