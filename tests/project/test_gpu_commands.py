"""`make gpu-test` and `make gpu-bench`, as far as they can be tried without a GPU."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_worker
from scripts import run_gpu_tests

NINE_MINUTES = 540


def test_a_command_is_ended_with_what_it_started(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    inner = f"import time; time.sleep(2); open({str(mark)!r}, 'w')"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    began = time.monotonic()
    status = run_gpu_tests.run([sys.executable, "-c", outer], 0.5)
    assert status == run_gpu_tests.TIMED_OUT
    assert time.monotonic() - began < 2
    time.sleep(2)
    assert not mark.exists()


@pytest.mark.parametrize("status", [0, 3])
def test_a_command_that_ends_keeps_its_status(status: int) -> None:
    command = [sys.executable, "-c", f"raise SystemExit({status})"]
    assert run_gpu_tests.run(command, 60) == status


def test_both_commands_end_inside_nine_minutes() -> None:
    assert run_gpu_tests.SECONDS < NINE_MINUTES
    assert gpu.CLOSING < gpu.SECONDS < NINE_MINUTES


@pytest.mark.parametrize(("exits", "status"), [((0, 0), 0), ((0, 1), 1), ((124, 0), 1)])
def test_both_stages_run_and_each_says_how_it_ended(
    exits: tuple[int, int],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[str] = []

    def stage(command: list[str], seconds: float, output: Any) -> int:
        seen.append(command[-1])
        output.write(f"said by {command[-1]}")
        return exits["gpu" in command[-1]]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "G")
    monkeypatch.setattr(run_gpu_tests, "run", stage)
    assert run_gpu_tests.main([]) == status
    assert sorted(seen) == ["tests/gpu", "tests/kernels"]
    said = capsys.readouterr().out
    words = {0: "passed", 1: "FAILED", 124: "NOT FINISHED"}
    for word, name, path in zip(exits, ("kernels", "engines"), ("kernels", "gpu"), strict=True):
        assert f"{words[word]}  {name}" in said and f"said by tests/{path}" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
@pytest.mark.parametrize("module", ["scripts.run_gpu_tests", "benchmarks.gpu"])
def test_without_a_gpu_they_say_so(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.startswith("No CUDA device")


class Engine:
    """Stands for `gpu.Child`; is gone after so many replies."""

    def __init__(self, replies: float = 1e9) -> None:
        self.replies = replies

    def ask(self, command: str, **request: Any) -> Any:
        self.replies -= 1
        if self.replies < 0:
            raise gpu.EngineGoneError(f"gone when asked for {command}")
        if command == "describe":
            return {"gpu": "G", "copy_bytes_per_second": 2.5e12}
        return {"rate": 100.0 * request["batch"] * 4 / request["mean"]}


def measured(begin: float, **engines: Any) -> dict[str, Any]:
    result: dict[str, Any] = {"machine": {}, "rows": [], "stopped": []}
    gpu.measure(engines, result, begin)
    return result


def test_every_row_is_measured_where_there_is_time() -> None:
    result = measured(time.monotonic() + 60, ours=Engine(), baseline=Engine())
    places = [(r["engine"], r["batch"], r["context"], r["depth"]) for r in result["rows"]]
    assert len(set(places)) == len(places)
    assert len(places) == len(gpu.BATCHES) * len(gpu.CONTEXTS) * (len(gpu.MEANS) + 1)
    assert all("rate" in row for row in result["rows"])
    assert not result["stopped"]
    # Side by side: whatever the machine does meanwhile, it does to both.
    assert [kind for kind, *_ in places[:8]] == (["ours"] * len(gpu.MEANS) + ["baseline"]) * 2


def test_rows_that_time_does_not_allow_are_named() -> None:
    rows = measured(time.monotonic() - 1, baseline=Engine())["rows"]
    assert len(rows) == len(gpu.BATCHES) * len(gpu.CONTEXTS)
    assert all(row["skipped"] == "out of time" for row in rows)


def test_an_engine_that_is_gone_leaves_what_it_had_measured() -> None:
    result = measured(time.monotonic() + 60, ours=Engine(replies=5), baseline=Engine())
    ours = [row for row in result["rows"] if row["engine"] == "ours"]
    assert ["rate" in row for row in ours[:5]] == [True] * 3 + [False] * 2
    assert ours[-1]["skipped"] == "the engine is gone"
    assert all("rate" in row for row in result["rows"] if row["engine"] == "baseline")
    assert result["stopped"] == ["ours: gone when asked for decode"]


def test_rows_are_held_against_the_baseline_and_the_bound() -> None:
    rows = measured(time.monotonic() + 60, ours=Engine(), baseline=Engine())["rows"]
    gpu.compare(rows)
    for row in rows:
        if row["engine"] == "ours":
            assert row["over_baseline"] == pytest.approx(4 / row["depth"])
            assert row["of_bound"] == pytest.approx(1)


def test_the_memory_roofline_is_the_weights_read_once_per_loop() -> None:
    # 24 layers of 4 H^2 + 3 H I weights per loop and H V for the read-out, in bf16.
    loop = 2 * 24 * (4 * 2048**2 + 3 * 2048 * 5632)
    read_out = 2 * 2048 * 49152
    assert gpu.roofline(3.35e12, 4.0) == pytest.approx(3.35e12 / (4 * loop + read_out))
    assert 325 < gpu.roofline(3.35e12, 4.0) < 450


def test_rates_are_tokens_over_time() -> None:
    marks = [(float(second), 50 * second) for second in range(40)]
    rates = gpu_worker.rates(marks)
    assert all(rates[name] == pytest.approx(50) for name in ("rate", "p20", "p50", "p80"))
