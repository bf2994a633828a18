"""`--target-tpot-ms` on the command line: what it takes, and which servers cannot have it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ouro_server import checkpoint, launch, settings
from ouro_server.presets import SHIPPED, PresetBook
from tests.server.fakes import LOOPS
from tests.server.test_cli import refused

BOOK = PresetBook.load(SHIPPED, LOOPS)


def target(*argv: str) -> float | None:
    return settings.target_tpot_ms(settings.depth_parser().parse_known_args(argv)[0])


def test_the_controller_is_off_by_default() -> None:
    assert target() is None


def test_a_target_is_a_number_of_milliseconds() -> None:
    assert target("--target-tpot-ms", "50") == 50
    assert target("--target_tpot_ms=2.5") == 2.5


@pytest.mark.parametrize("value", ["0", "-5", "nan", "inf", "fast", ""])
def test_a_bad_target_is_named(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused([f"--target-tpot-ms={value}"], capsys)
    assert "--target-tpot-ms must be a number of milliseconds above 0" in line
    assert repr(value) in line


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--api-server-count", "2"], "needs one API process"),
        (["--disable-log-stats"], "--disable-log-stats"),
    ],
)
def test_a_server_that_cannot_be_steered_is_refused(argv: list[str], reason: str) -> None:
    with pytest.raises(checkpoint.RefusedError, match=reason):
        launch.check_steering(launch.parse(argv), BOOK)


def test_floors_are_of_the_gates_rule() -> None:
    with pytest.raises(checkpoint.RefusedError, match="default rule is margin"):
        launch.check_steering(launch.parse([]), BOOK, "margin")


def test_floors_are_needed() -> None:
    book = PresetBook.parse({"presets": {"fast": {"exit_threshold": 0.3}}}, LOOPS)
    with pytest.raises(checkpoint.RefusedError, match="priority_classes"):
        launch.check_steering(launch.parse([]), book)


def test_data_parallel_servers_keep_one_api_process() -> None:
    args = launch.parse(["--data-parallel-size", "2"])
    launch.check_steering(args, BOOK)
    assert args.api_server_count == 1


def test_help_explains_it(capsys: pytest.CaptureFixture[str]) -> None:
    settings.depth_parser().print_help()
    assert "--target-tpot-ms MS" in capsys.readouterr().out


def test_a_presets_file_without_classes_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "presets.yaml"
    file.write_text("presets: {fast: {exit_threshold: 0.3}}\n")
    line = refused(["--target-tpot-ms", "50", "--presets", str(file)], capsys)
    assert "--target-tpot-ms needs priority_classes" in line
