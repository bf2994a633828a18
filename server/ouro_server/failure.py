"""Why a server cannot start, or has stopped, in one line and the user's words."""

import errno
import re
import socket
from argparse import Namespace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ouro_runtime.engine.core_process import noted
from ouro_server.cli import one_line, plain
from ouro_server.vllm_api import current_platform

_CORE = re.compile(r"Failed core proc\(s\): \{[^}]*: (-?\d+)\}")
_WORKER = re.compile(r"Worker failed with error ['\"](.*)['\"], please check the stack trace.*")
_SMALL_POOL = re.compile(r"Try increasing `gpu_memory_utilization`.*")
_FEW_NODES = "Please try to bind threads manually or decrease DP/TP/PP."
_BIND = (
    "Set VLLM_CPU_OMP_THREADS_BIND in the environment: nobind lets the ranks share all cores, a "
    "list such as 0-3|4-7 gives each its own."
)
_NO_MEMORY = "can't allocate memory"
_NO_COMPILER = "No working C++ compiler found"
KILLED = -9


def why(error: Exception, args: Namespace, folder: Path) -> str:
    """What to tell about an exception that ended the start of a server.

    Args:
        args: the server's options. folder: see `run_folder.py`.
    """
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return f"port {args.port} of {args.host} is in use; choose another with --port"
    if isinstance(error, OSError) and error.errno == errno.EACCES and not error.filename:
        return f"port {args.port} of {args.host} may not be used; choose one above 1023 with --port"
    if isinstance(error, OSError) and error.errno == errno.EADDRNOTAVAIL:
        return f"{args.host} is no address of this machine; choose another with --host"
    if isinstance(error, socket.gaierror):
        return f"{args.host}: no such host; choose another with --host"
    if isinstance(error, ValidationError):
        return "; ".join(dict.fromkeys(_said(e, args) for e in error.errors()))
    if isinstance(error, ImportError) and (option := _asks_for(str(error.name), args)):
        return f"{option}: {plain(error)}"
    told = noted(folder)
    text = _WORKER.sub(r"\1", told or plain(error))
    core = None if told else _CORE.search(text)
    if core:
        text = died(int(core[1]))
    if _SMALL_POOL.search(text):
        return _SMALL_POOL.sub(_advice(args), text)
    if _FEW_NODES in text:
        return text.replace(_FEW_NODES, _BIND)
    if _NO_MEMORY in text:
        return f"the model and its K/V do not fit into memory ({text})"
    if _NO_COMPILER in text:
        return "no C++ compiler found to compile the model with: install g++, or --enforce-eager"
    return text


def _said(error: Any, args: Namespace) -> str:
    """One of pydantic's errors: the option it is about, not where in vLLM's configuration it is."""
    message = one_line(error["msg"].removeprefix("Value error, "))
    name = next((str(n) for n in reversed(error["loc"]) if hasattr(args, str(n))), None)
    return f"--{name.replace('_', '-')}: {message}" if name else message


def _asks_for(module: str, args: Namespace) -> str | None:
    """The option that names something in a Python module, such as --middleware."""
    for name, value in vars(args).items():
        values = value if isinstance(value, list) else [value]
        if any(isinstance(v, str) and v.startswith((f"{module}.", f"{module}:")) for v in values):
            return "--" + name.replace("_", "-")
    return None


def _advice(args: Namespace) -> str:
    """How to make the K/V pool larger, or less of it needed."""
    by_bytes = current_platform.is_cpu() or args.kv_cache_memory_bytes
    option = "--kv-cache-memory-bytes" if by_bytes else "--gpu-memory-utilization"
    return f"Set a larger {option}, or a smaller --max-model-len."


def died(code: int) -> str:
    """Of an engine process that ended without a word."""
    if code == KILLED:
        return "the engine process was killed: most likely memory ran out"
    if code < 0:
        return f"the engine process was ended by signal {-code}"
    return f"the engine process ended with status {code}"


def death(args: Namespace, folder: Path) -> str | None:
    """Why the engine of a server that has stopped serving died; None if it was told to stop.

    Args:
        args: `args.engine_exits` are the statuses of engine processes that ended before the server
            did (`plugin.note_exits`).
    """
    codes = [code for code in getattr(args, "engine_exits", ()) if code]
    return (noted(folder) or died(codes[0])) if codes else None
