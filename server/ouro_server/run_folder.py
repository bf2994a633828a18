"""A folder of one start's own: the sockets between its processes, and what one that failed said.

It goes when the server ends. One whose server was killed goes when the next one starts.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

_PREFIX = "ouro-serve-"


@contextmanager
def run_folder() -> Iterator[Path]:
    """The folder, named to this process and those it starts, by `OURO_RUN_FOLDER` and vLLM's own
    variable for sockets (a user's choice of which stands)."""
    base = Path(tempfile.gettempdir())
    sweep(base)
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=base))
    added = {"OURO_RUN_FOLDER": str(folder)}
    if "VLLM_RPC_BASE_PATH" not in os.environ:
        added["VLLM_RPC_BASE_PATH"] = str(folder)
    os.environ.update(added)
    try:
        yield folder
    finally:
        for name in added:
            os.environ.pop(name, None)
        shutil.rmtree(folder, ignore_errors=True)


def sweep(base: Path) -> None:
    """Remove the folders of servers that are no more."""
    for folder in base.glob(f"{_PREFIX}*-*"):
        owner = re.match(rf"{_PREFIX}(\d+)-", folder.name)
        if owner and folder.is_dir() and not psutil.pid_exists(int(owner[1])):
            shutil.rmtree(folder, ignore_errors=True)
