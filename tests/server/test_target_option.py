"""Targets on the command line: what they take, and which servers cannot have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ouro_server import checkpoint, launch, settings
from ouro_server.presets import SHIPPED, PresetBook
from ouro_server.settings import Targets
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


LATENCY, AGREEMENT, AUDIT = Targets(tpot_ms=50), Targets(agreement=0.99), Targets(audit=0.1)


def check(
    targets: Targets, argv: list[str], book: PresetBook = BOOK, depth: dict[str, Any] | None = None
) -> Any:
    """vLLM's options, checked for the targets."""
    args = launch.parse(argv)
    args.targets = targets
    launch.check_targets(args, book, depth or {})
    return args


@pytest.mark.parametrize(
    ("targets", "argv", "reason"),
    [
        (LATENCY, ["--api-server-count", "2"], "--target-tpot-ms needs one API process"),
        (AGREEMENT, ["--api-server-count", "2"], "--target-agreement needs one API process"),
        (LATENCY, ["--disable-log-stats"], "--disable-log-stats"),
        (Targets(agreement=0.99, audit=0.1), ["--max-logprobs", "0"], "--max-logprobs 0 forbids"),
        (AGREEMENT, ["--logits-processors", "a.b"], "after --logits-processors"),
    ],
)
def test_a_server_that_cannot_hold_it_is_refused(
    targets: Targets, argv: list[str], reason: str
) -> None:
    with pytest.raises(checkpoint.RefusedError, match=reason):
        check(targets, argv)


def test_answers_that_are_those_of_full_depth_leave_nothing_to_steer() -> None:
    with pytest.raises(checkpoint.RefusedError, match="--exit-mode lossless"):
        check(AGREEMENT, [], depth={"exit_mode": "lossless"})


@pytest.mark.parametrize("targets", [LATENCY, AGREEMENT])
def test_floors_are_of_one_exit_rule(targets: Targets) -> None:
    with pytest.raises(checkpoint.RefusedError, match="the default rule is margin"):
        check(targets, [], depth={"exit_rule": "margin", "exit_threshold": 0.5})


def test_audits_ask_for_little() -> None:
    argv = ["--api-server-count", "2", "--disable-log-stats"]
    assert check(AUDIT, argv, PresetBook.parse({}, LOOPS)).api_server_count == 2


@pytest.mark.parametrize("targets", [LATENCY, AGREEMENT])
def test_floors_are_needed(targets: Targets) -> None:
    book = PresetBook.parse({"presets": {"fast": {"exit_threshold": 0.3}}}, LOOPS)
    with pytest.raises(checkpoint.RefusedError, match="priority_classes"):
        check(targets, [], book)


@pytest.mark.parametrize("targets", [LATENCY, AGREEMENT])
def test_data_parallel_servers_keep_one_api_process(targets: Targets) -> None:
    assert check(targets, ["--data-parallel-size", "2"]).api_server_count == 1


def targets(*argv: str) -> Targets:
    return Targets.of(settings.depth_parser().parse_known_args(argv)[0])


def test_nothing_is_held_or_audited_by_default() -> None:
    assert targets() == Targets(None, None, 0.0)


def test_an_agreement_implies_audits() -> None:
    assert targets("--target-agreement", "0.99") == Targets(None, 0.99, settings.AUDIT_SHARE)
    assert targets("--target-agreement=0.9", "--audit=0.5") == Targets(None, 0.9, 0.5)
    assert targets("--audit", "1") == Targets(None, None, 1)


@pytest.mark.parametrize(
    ("option", "value"),
    [("--audit", v) for v in ("0", "1.1", "-1", "nan", "all", "")]
    + [("--target-agreement", v) for v in ("0.4", "1", "99", "nan", "high")],
)
def test_a_bad_share_is_named(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused([f"{option}={value}"], capsys)
    assert f"{option} must be a number" in line
    assert repr(value) in line


def test_help_explains_it(capsys: pytest.CaptureFixture[str]) -> None:
    settings.depth_parser().print_help()
    help_text = capsys.readouterr().out
    assert "--target-tpot-ms MS" in help_text
    assert "--target-agreement SHARE" in help_text
    assert "with 95 % confidence" in help_text
    assert "--audit SHARE" in help_text


def test_a_presets_file_without_classes_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "presets.yaml"
    file.write_text("presets: {fast: {exit_threshold: 0.3}}\n")
    line = refused(["--target-tpot-ms", "50", "--presets", str(file)], capsys)
    assert "--target-tpot-ms needs priority_classes" in line
