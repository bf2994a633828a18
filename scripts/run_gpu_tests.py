"""The tests that need an NVIDIA GPU: `make gpu-test`. Ends inside nine minutes whatever happens.

First the kernels, compiled instead of interpreted; then engines, on the golden data. Each stage is
a pytest process of its own, and is killed when its time is up.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 520
"""For all stages together."""

KERNEL_SECONDS = 240
"""Of these, what the kernels may take."""

TIMED_OUT = 124


def run(command: Sequence[str], seconds: float) -> int:
    """A command's exit status; `TIMED_OUT` if it, and whatever it started, had to be killed."""
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True) as process:
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
        "kernels": ([*pytest, "tests/kernels"], KERNEL_SECONDS),
        "engines": ([*pytest, "-m", "gpu", "tests/gpu"], SECONDS),
    }
    closings = []
    for name, (command, seconds) in stages.items():
        print(f"\n== {name}", flush=True)
        left = SECONDS - (time.monotonic() - began)
        status = run(command, min(seconds, left))
        word = {0: "passed", TIMED_OUT: "NOT FINISHED"}.get(status, "FAILED")
        closings.append((word, name))
    print(f"\n== on {torch.cuda.get_device_name()}, {time.monotonic() - began:.0f} s")
    for word, name in closings:
        print(f"{word}  {name}")
    return 0 if all(word == "passed" for word, _ in closings) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
