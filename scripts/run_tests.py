"""Runs the whole test suite: quick folders first, then kernels, then what starts engines.

Each stage is a pytest process of its own. The kernels need one: on a machine without a GPU their
tests set TRITON_INTERPRET=1, which triton reads when it is imported, and vLLM imports it too. They
run twice, with the newest and with the oldest triton. All stages run even if one fails; the exit
status says whether any did.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENGINES = ("benchmarks", "engine", "observability", "server")
"""Folders of tests/ that start vLLM engines, and so come last."""

OLDEST_TRITON = Path(sys.prefix) / "triton-oldest"
"""Where scripts/install.py puts it; a CUDA build has one triton only, and no such folder."""

NOT_TESTS = ("golden",)
NO_TESTS = 5
"""pytest's exit status when it collected nothing."""


def stages(tests: Path) -> dict[str, list[str]]:
    """What each pytest process runs, in order; every test below `tests` is in exactly one."""
    folders = {
        path.name
        for path in tests.iterdir()
        if path.is_dir() and path.name not in NOT_TESTS and any(path.rglob("test_*.py"))
    }
    loose = sorted(path.name for path in tests.glob("test_*.py"))
    plan = {
        "quick": [*loose, *sorted(folders - {"kernels", *ENGINES})],
        "kernels": ["kernels"] if "kernels" in folders else [],
        "engines": [name for name in ENGINES if name in folders],
    }
    return {name: [str(tests / path) for path in paths] for name, paths in plan.items() if paths}


def runs(plan: dict[str, list[str]], oldest: Path) -> list[tuple[str, list[str], dict[str, str]]]:
    """(name, paths, environment) of each pytest process of the stages `plan`."""
    here = dict(os.environ)
    processes = []
    for name, paths in plan.items():
        processes.append((name, paths, here))
        if name == "kernels" and oldest.is_dir():
            path = os.pathsep.join([str(oldest), *filter(None, [here.get("PYTHONPATH")])])
            processes.append(("kernels (oldest triton)", paths, here | {"PYTHONPATH": path}))
    return processes


def main(arguments: list[str]) -> int:
    """Run every stage with `arguments` for pytest; 1 if any failed."""
    closings = []
    for name, paths, environment in runs(stages(ROOT / "tests"), OLDEST_TRITON):
        print(f"\n== {name} tests", flush=True)
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-m", "not gpu", *arguments, *paths],
            cwd=ROOT,
            env=environment,
        )
        passed = done.returncode in (0, NO_TESTS)
        closings.append((name, passed, time.monotonic() - started))
    print("\n== all tests")
    for name, passed, seconds in closings:
        print(f"{'passed' if passed else 'FAILED'}  {name} ({seconds:.0f} s)")
    return 0 if all(passed for _, passed, _ in closings) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
