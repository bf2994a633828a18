"""SIGTERM and SIGINT while a server starts: everything that was started ends, without a word.

vLLM's handler raises KeyboardInterrupt, which vLLM itself drops where it waits for the engine
(`zmq_socket_ctx`); from there on it waits for an engine that it no longer answers.
"""

import inspect
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, SimpleNamespace
from unittest import mock

from ouro_server.vllm_api import api_server

SIGNALS = (signal.SIGTERM, signal.SIGINT)

_source = inspect.getsource(api_server)
assert "signal.signal(signal.SIGTERM, _interrupt_init)" in _source, "vLLM handles SIGTERM elsewhere"
assert _source.count("signal.signal(") == 1, "vLLM handles more signals while it starts"


@contextmanager
def stoppable() -> Iterator[None]:
    """In the block the first of both signals raises SystemExit with a shell's status for it, until
    vLLM serves and stops in its own way. Further ones change nothing: it is ending."""

    def stop(number: int, _: FrameType | None) -> None:
        for other in SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + number)

    keep_ours = SimpleNamespace(SIGTERM=signal.SIGTERM, signal=lambda number, handler: None)
    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        with mock.patch.object(api_server, "signal", keep_ours):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
