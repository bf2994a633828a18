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

from ouro_runtime.lean import FOLDER

_PREFIX = "ouro-serve-"
_SERVES = "serves"
_NAMES = len("/ouro-serve-4194304-12345678/") + len("/12345678-1234-1234-1234-123456789012")
_SOCKET_PATH = 107
"""Bytes that the path of a Unix socket may have."""


@contextmanager
def run_folder(one_host: bool = True) -> Iterator[Path]:
    """The folder, named to this process and those it starts, by `OURO_RUN_FOLDER` and vLLM's own
    variable for sockets (a user's choice of which stands).

    Args:
        one_host: whether all processes are on this one; Ray gives vLLM's variables to processes on
            others, where this folder is not.
    """
    base = Path(tempfile.gettempdir())
    if len(os.fsencode(base)) + _NAMES > _SOCKET_PATH:
        base = Path("/tmp")
    sweep(base)
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=base))
    added = {FOLDER: str(folder)}
    if one_host and "VLLM_RPC_BASE_PATH" not in os.environ:
        added["VLLM_RPC_BASE_PATH"] = str(folder)
    os.environ.update(added)
    try:
        yield folder
    finally:
        for name in added:
            os.environ.pop(name, None)
        shutil.rmtree(folder, ignore_errors=True)


def now_serves() -> None:
    """Note, in the folder, that requests are taken from now on."""
    folder = os.environ.get(FOLDER)
    if folder is not None:
        Path(folder, _SERVES).touch()


def serves(folder: Path) -> bool:
    """Whether the server of this folder has taken requests."""
    return (folder / _SERVES).exists()


def sweep(base: Path) -> None:
    """Remove the folders of servers that are no more."""
    for folder in base.glob(f"{_PREFIX}*-*"):
        owner = re.match(rf"{_PREFIX}(\d+)-", folder.name)
        if owner and folder.is_dir() and not psutil.pid_exists(int(owner[1])):
            shutil.rmtree(folder, ignore_errors=True)
