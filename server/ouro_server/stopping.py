"""SIGTERM and SIGINT where `draining.py` does not have them.

While a server starts, everything that was started ends, without a word. In the first of several API
processes, further signals reach the others.

vLLM's handler raises KeyboardInterrupt, which vLLM itself drops where it waits for the engine
(`zmq_socket_ctx`); from there on it waits for an engine that it no longer answers.
"""

import inspect
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, SimpleNamespace
from unittest import mock

from ouro_server.vllm_api import APIServerProcessManager, CoreEngineProcManager, api_server

SIGNALS = (signal.SIGTERM, signal.SIGINT)

_source = inspect.getsource(api_server)
assert "signal.signal(signal.SIGTERM, _interrupt_init)" in _source, "vLLM handles SIGTERM elsewhere"
assert _source.count("signal.signal(") == 1, "vLLM handles more signals while it starts"


@contextmanager
def stoppable() -> Iterator[None]:
    """In the block the first of both signals raises SystemExit with a shell's status for it, until
    the server serves and drains. Further ones change nothing: it is ending."""

    def stop(number: int, _: FrameType | None) -> None:
        for other in SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + number)

    drained = False

    def shutdown(manager: APIServerProcessManager, timeout: float | None = None) -> None:
        # vLLM's first process has had its signal; it would only wait for the others.
        def forward(*_: object) -> None:
            for process in manager.processes:
                process.terminate()

        for other in SIGNALS:
            signal.signal(other, forward)
        nonlocal drained
        end_servers(manager, timeout)
        drained = True

    def end_drained(manager: CoreEngineProcManager, timeout: float | None = None) -> None:
        # Nobody asks them any more: as without a grace period, at once and without a word.
        end_engines(manager, 0.0 if drained else timeout)

    end_servers, end_engines = APIServerProcessManager.shutdown, CoreEngineProcManager.shutdown
    keep_ours = SimpleNamespace(SIGTERM=signal.SIGTERM, signal=lambda number, handler: None)
    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        with (
            mock.patch.object(api_server, "signal", keep_ours),
            mock.patch.object(APIServerProcessManager, "shutdown", shutdown),
            mock.patch.object(CoreEngineProcManager, "shutdown", end_drained),
        ):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
