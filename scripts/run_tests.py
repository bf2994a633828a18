"""Runs the whole test suite: its stages side by side, as many as there are cores, two at most.

Each stage is a pytest process of its own. The kernels need one: on a machine without a GPU their
tests set TRITON_INTERPRET=1, which triton reads when it is imported, and vLLM imports it too. They
run twice, with the newest and with the oldest triton. What a stage prints is shown when it ends, so
that it can be read; the longest begin first. All stages run even if one fails; the exit status says
whether any did.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
ENGINES: dict[str, tuple[str, ...]] = {
    "servers": ("server",),
    "engines": ("engine",),
    "cuda engine": ("cuda",),
    "benchmarks": ("benchmarks", "observability"),
}
"""Stages that start vLLM engines or servers, the longest first, and their folders of tests/."""

OLDEST_TRITON = Path(sys.prefix) / "triton-oldest"
"""Where scripts/install.py puts it; a CUDA build has one triton only, and no such folder."""

NOT_TESTS = ("golden",)
NO_TESTS = 5
"""pytest's exit status when it collected nothing."""

AT_ONCE = min(2, os.cpu_count() or 1)
HEARTBEAT_SECONDS = 60


def stages(tests: Path) -> dict[str, list[str]]:
    """What each pytest process runs, in order; every test below `tests` is in exactly one."""
    folders = {
        path.name
        for path in tests.iterdir()
        if path.is_dir() and path.name not in NOT_TESTS and any(path.rglob("test_*.py"))
    }
    loose = sorted(path.name for path in tests.glob("test_*.py"))
    own = {"kernels", *(name for names in ENGINES.values() for name in names)}
    plan = {name: [f for f in names if f in folders] for name, names in ENGINES.items()}
    plan |= {
        "kernels": ["kernels"] if "kernels" in folders else [],
        "quick": [*loose, *sorted(folders - own)],
    }
    return {name: [str(tests / path) for path in paths] for name, paths in plan.items() if paths}


@dataclass
class Run:
    """One pytest process.

    Attributes:
        environment: the whole of it; a stage has the threads of one core.
    """

    name: str
    paths: list[str]
    environment: Mapping[str, str]
    output: IO[bytes] | None = None
    process: subprocess.Popen[bytes] | None = None
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return self.process is not None and self.process.poll() in (0, NO_TESTS)

    def start(self, arguments: Sequence[str]) -> None:
        self.seconds = -time.monotonic()
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 (`show` closes it)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-m", "not gpu", *arguments, *self.paths],
            cwd=ROOT,
            env=dict(self.environment),
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )

    def show(self) -> None:
        """Print what the process printed, once it has ended."""
        self.seconds += time.monotonic()
        assert self.output is not None
        with self.output as output:
            output.seek(0)
            text = output.read().decode(errors="replace")
        print(f"\n== {self.name} tests\n{text}", flush=True)


def runs(plan: Mapping[str, list[str]], oldest: Path) -> list[Run]:
    """The pytest processes of the stages `plan`."""
    here = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    processes = []
    for name, paths in plan.items():
        processes.append(Run(name, paths, here))
        if name == "kernels" and oldest.is_dir():
            path = os.pathsep.join([str(oldest), *filter(None, [here.get("PYTHONPATH")])])
            processes.append(Run("kernels (oldest triton)", paths, here | {"PYTHONPATH": path}))
    return processes


def run_all(waiting: list[Run], arguments: Sequence[str], at_once: int) -> None:
    """Run every process, `at_once` at a time; ends those that run if it is interrupted."""
    running: list[Run] = []
    told = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(waiting.pop(0))
                running[-1].start(arguments)
            time.sleep(0.1)
            for run in [
                r for r in running if r.process is not None and r.process.poll() is not None
            ]:
                running.remove(run)
                run.show()
                told = time.monotonic()
            if running and time.monotonic() - told > HEARTBEAT_SECONDS:
                told = time.monotonic()
                print(f"... {' and '.join(run.name for run in running)} tests run", flush=True)
    finally:
        for run in running:
            if run.process is not None:
                run.process.terminate()
                run.process.wait()
                run.show()


def main(arguments: list[str]) -> int:
    """Run every stage with `arguments` for pytest; 1 if any failed."""
    processes = runs(stages(ROOT / "tests"), OLDEST_TRITON)
    print(f"{len(processes)} stages, {AT_ONCE} at a time", flush=True)
    run_all(list(processes), arguments, AT_ONCE)
    print("\n== all tests")
    for run in processes:
        print(f"{'passed' if run.passed else 'FAILED'}  {run.name} ({run.seconds:.0f} s)")
    return 0 if all(run.passed for run in processes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
