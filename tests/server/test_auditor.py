"""When audits run, and what becomes of them, against an engine that answers as it is told."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest
from vllm.sampling_params import RequestOutputKind

from ouro_server.audit import auditor as module
from ouro_server.audit import room
from ouro_server.vllm_api import EngineDeadError
from tests.server.auditing import WHOLE, Bench, params, run

SECRET = "what a user wrote"


def test_the_queue_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ANSWERS", 3)

    async def play(bench: Bench) -> None:
        bench.engine.hold = asyncio.Event()
        for _ in range(6):
            await bench.ask()
            await asyncio.sleep(0.02)
        assert bench.auditor.waiting == 3
        bench.engine.hold.set()
        await bench.until(lambda: bench.count("audited_requests_total") == 4)

    assert run(Bench(), play).unaudited() == {"dropped": 2}


def test_one_at_a_time() -> None:
    async def play(bench: Bench) -> None:
        bench.engine.hold = asyncio.Event()
        for _ in range(3):
            await bench.ask()
        await asyncio.sleep(0.05)
        assert len(bench.engine.audits) == 1
        bench.engine.hold.set()
        await bench.until(lambda: bench.count("audited_requests_total") == 3)

    run(Bench(), play)


def test_a_long_audit_is_given_up_for_whoever_comes_and_not_begun_for_ever() -> None:
    async def play(bench: Bench) -> None:
        bench.engine.hold = asyncio.Event()
        await bench.ask()
        for turn in range(1, module.MOST_TRIES + 1):
            await bench.until(partial(begun, bench, turn))
            await bench.ask(params(WHOLE))
        await bench.until(lambda: bool(bench.unaudited()))

    bench = run(Bench(step=2), play)
    assert bench.unaudited() == {"interrupted": 1}
    assert bench.engine.aborted == module.MOST_TRIES


def begun(bench: Bench, audits: int) -> bool:
    return len(bench.engine.audits) == audits


def test_a_short_audit_is_not_given_up() -> None:
    async def play(bench: Bench) -> None:
        bench.engine.hold = asyncio.Event()
        await bench.ask()
        await bench.until(lambda: len(bench.engine.audits) == 1)
        await bench.ask(params(WHOLE))
        bench.engine.hold.set()
        await bench.until(lambda: bench.count("audited_requests_total") == 1)

    assert run(Bench(), play).engine.aborted == 0


def test_a_short_audit_that_stands_in_the_engines_queue_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(room, "MOST_BESIDE", 1)

    async def play(bench: Bench) -> None:
        bench.engine.hold = asyncio.Event()
        await bench.ask()
        await bench.until(lambda: len(bench.engine.audits) == 1)
        await bench.ask(params(WHOLE, output_kind=RequestOutputKind.DELTA))
        await bench.until(lambda: len(bench.engine.audits) == 2)
        bench.engine.hold.set()
        await bench.until(lambda: bench.count("audited_requests_total") == 1)

    assert run(Bench(), play).engine.aborted == 1


def test_a_server_that_stops_aborts_the_audit_and_forgets_the_others() -> None:
    async def play(bench: Bench) -> None:
        bench.engine.hold = asyncio.Event()
        await bench.ask()
        await bench.ask()
        await bench.until(lambda: len(bench.engine.audits) == 1)

    bench = run(Bench(), play)
    assert bench.engine.aborted == 1
    assert bench.auditor.waiting == 0

    async def later() -> None:
        await bench.ask()
        assert bench.auditor.waiting == 0

    asyncio.run(later())


def test_a_failed_audit_is_counted_and_not_quoted(caplog: pytest.LogCaptureFixture) -> None:
    async def play(bench: Bench) -> None:
        bench.engine.fail = ValueError(SECRET)
        await bench.ask()
        await bench.until(lambda: bool(bench.unaudited()))
        bench.engine.fail = None
        await bench.ask()
        await bench.until(lambda: bench.count("audited_requests_total") == 1)

    bench = run(Bench(), play)
    assert bench.unaudited() == {"failed": 1}
    assert "an audit failed: ValueError" in caplog.text
    assert SECRET not in caplog.text


def test_with_the_engine_audits_end() -> None:
    async def play(bench: Bench) -> None:
        bench.engine.fail = EngineDeadError()
        await bench.ask()
        await bench.until(lambda: bench.auditor.ended)

    run(Bench(), play)


def test_what_audits_do_not_understand_reaches_the_client(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError(SECRET)

    async def play(bench: Bench) -> None:
        monkeypatch.setattr(bench.picker, "pick", broken)
        assert len(await bench.ask()) == 1
        monkeypatch.undo()
        bench.engine.depths = [1]
        monkeypatch.setattr("ouro_server.audit.tap.Notes.hear", broken)
        assert len(await bench.ask()) == 1

    bench = run(Bench(), play)
    assert bench.engine.audits == []
    assert caplog.text.count("ZeroDivisionError") == 2
    assert SECRET not in caplog.text
