"""Seam: an engine core that fails says why to who started it, in one line instead of a traceback.

The server gives its processes a folder (`FOLDER` in the environment). Without one, as when vLLM is
used from Python, nothing changes; with vLLM's log at DEBUG the traceback stays.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from ouro_runtime.lean import FOLDER, lean

if FOLDER in os.environ:
    lean()  # an engine core imports this file before anything of vLLM's

from vllm.v1.engine.core import EngineCoreProc

from ouro_runtime.engine.pin import check_parameters

_FILE = "failure"

vllms = EngineCoreProc.run_engine_core
check_parameters(vllms, "dp_rank", "local_dp_rank")


def run_engine_core(*args: Any, **kwargs: Any) -> None:
    """vLLM's engine core, in a process of its own."""
    folder = os.environ.get(FOLDER)
    if folder is not None:
        end_with_parent()
    if folder is None or os.environ.get("VLLM_LOGGING_LEVEL", "").upper() == "DEBUG":
        vllms(*args, **kwargs)
        return
    logging.getLogger("vllm.v1.engine.core").addFilter(_is_no_failed_start)
    try:
        vllms(*args, **kwargs)
    except Exception as error:
        note(Path(folder), error)
        sys.exit(1)


def end_with_parent() -> None:
    """Let the kernel end this process when the one that started it is gone, however it went: vLLM's
    engine core would wait for requests for ever, with the model in memory."""
    set_death_signal = 1  # PR_SET_PDEATHSIG, see prctl(2)
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def _is_no_failed_start(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("EngineCore failed to start")


def note(folder: Path, error: Exception) -> None:
    """Leave word of the first failure; what it brings down with it says less."""
    file = folder / _FILE
    if folder.is_dir() and not file.exists():
        file.write_text(reason(error))


def noted(folder: Path) -> str | None:
    """Why an engine core failed, if it said so."""
    try:
        return (folder / _FILE).read_text()
    except FileNotFoundError:
        return None


def reason(error: BaseException) -> str:
    """An error as one line: its message, or that of its cause if it has none, else its kind."""
    text = str(error).strip()
    if not text and error.__cause__ is not None:
        return reason(error.__cause__)
    return " ".join(text.split()) or type(error).__name__


def install() -> None:
    """Start engine cores this way."""
    EngineCoreProc.run_engine_core = staticmethod(run_engine_core)
