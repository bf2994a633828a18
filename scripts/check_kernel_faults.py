"""Puts each known fault into a copy of the kernels and expects their tests to fail.

A check of the tests (`tests/kernels/faults.py` is the list). Minutes; `make kernel-faults` runs it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.kernels.faults import FAULTS  # noqa: E402

KERNELS = ROOT / "kernels"
FAILED = 1
"""pytest's exit status when a test failed; any other is no verdict."""


def occurrences(kernel: str, right: str) -> int:
    """How often a kernel's source says `right`."""
    return (KERNELS / "ouro_kernels" / kernel / "triton.py").read_text().count(right)


def caught(kernel: str, right: str, wrong: str) -> bool:
    """Whether the tests of `kernel` fail, or crash, with `wrong` in the place of `right`.

    Raises:
        RuntimeError: if they did not run.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "ouro_kernels"
        shutil.copytree(
            KERNELS / "ouro_kernels", copy, ignore=shutil.ignore_patterns("__pycache__")
        )
        source = copy / kernel / "triton.py"
        source.write_text(source.read_text().replace(right, wrong, 1))
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"),
                *("-m", "not gpu", f"tests/kernels/test_{kernel}.py"),
                f"tests/kernels/test_wide_offsets.py::test_{kernel}",
            ],
            cwd=ROOT,
            env=os.environ | {"OURO_KERNELS": folder, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
    if done.returncode > FAILED:
        raise RuntimeError(done.stdout + done.stderr)
    return done.returncode != 0


def check(kernels: Iterable[str]) -> int:
    """Try every fault of `kernels`; the number of those that nobody noticed."""
    faults = [(kernel, *fault) for kernel in kernels for fault in FAULTS[kernel]]
    unseen = 0
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        for fault, seen in zip(faults, pool.map(lambda f: caught(*f), faults), strict=True):
            unseen += not seen
            kernel, right, wrong = (" ".join(part.split()) for part in fault)
            print(f"{'caught' if seen else 'UNSEEN'}  {kernel}: {right[-60:]} -> {wrong[-60:]}")
            sys.stdout.flush()
    print(f"{len(faults) - unseen} of {len(faults)} faults caught")
    return unseen


if __name__ == "__main__":
    sys.exit(1 if check(sys.argv[1:] or FAULTS) else 0)
