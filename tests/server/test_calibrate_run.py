"""A calibration from its command line to its files, with an engine that is none."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ouro_server import checkpoint, cli
from ouro_server.calibrate import command
from ouro_server.calibrate.plan import NO_PROMISE, THRESHOLDS
from ouro_server.calibrate.state import opened
from ouro_server.presets import SHIPPED, PresetBook
from tests.server.calibrating import LOOPS, FakeEngine


@pytest.fixture(autouse=True)
def environ(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command sets environment variables; this test's end unsets them."""
    monkeypatch.setattr(os, "environ", os.environ.copy())


class Calibration:
    """Runs of the command in one folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.out = folder, folder / "out"
        self._patch = monkeypatch

    def ask(self, count: int, expected: bool = True) -> None:
        lines = [
            {"prompt": str(n)} | ({"expected": str(n + 1)} if expected else {})
            for n in range(count)
        ]
        (self.folder / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def run(self, engine: FakeEngine | None, *options: str) -> int:
        """The exit status; without an engine, one that is asked for is a failure."""

        def start(*_: object) -> FakeEngine:
            assert engine is not None, "an engine was started"
            return engine

        self._patch.setattr(command, "start", start)
        where = ["ouro-mini", str(self.folder / "q.jsonl"), "--out", str(self.out)]
        return cli.main(["calibrate", *where, *options])

    def lines(self) -> list[str]:
        return (self.out / "state.jsonl").read_text().splitlines()

    def report(self) -> str:
        return (self.out / "report.md").read_text()


@pytest.fixture
def calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calibration:
    made = Calibration(tmp_path, monkeypatch)
    made.ask(400)
    return made


FEW_FAIL = dict.fromkeys(range(30), 0.35) | {0: 0.55}
"""One answer is lost below 0.55, thirty below 0.35."""


def test_the_lowest_threshold_that_keeps_the_promise_becomes_a_preset(
    calibration: Calibration, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--thresholds", "0.6,0.5,0.4,0.3,0.2", "--loss", "0.02"]
    assert calibration.run(FakeEngine(FEW_FAIL), *options) == 0
    file = calibration.out / "presets.yaml"
    assert f"--presets {file}" in capsys.readouterr().out
    book = PresetBook.load(file, LOOPS)
    assert book.presets["agree-98"].controls == {
        "exit_threshold": 0.4,
        "min_loops": 1,
        "max_loops": LOOPS,
        "exit_mode": "skip",
        "exit_rule": "gate",
    }
    shipped = PresetBook.load(SHIPPED, LOOPS)
    assert {**book.presets, **shipped.presets} == dict(book.presets)
    assert (book.efforts, book.floors) == (shipped.efforts, shipped.floors)
    rows = [line.split(" | ") for line in calibration.report().splitlines() if line[:3] == "| 0"]
    assert [row[0].strip("| ") for row in rows] == ["0.6", "0.5", "0.4", "0.3", "0.2"]
    assert [row[2] for row in rows] == ["0", "1", "1", "30", "30"]
    assert [row[-1].strip("| ") for row in rows] == ["passed", "passed", "**chosen**", "", ""]
    picture = ElementTree.parse(calibration.out / "report.svg").getroot()
    assert [c.get("fill") == "white" for c in picture.findall(".//{*}circle")].count(True) == 2
    assert {"promise 2 %", "0.4", "skip"} <= {t.text for t in picture.findall(".//{*}text")}


def test_few_questions_give_no_promise_and_no_preset(
    calibration: Calibration, capsys: pytest.CaptureFixture[str]
) -> None:
    calibration.ask(298)
    calibration.out.mkdir()
    (calibration.out / "presets.yaml").write_text("presets: {agree-99: {exit_threshold: 0.1}}")
    assert calibration.run(FakeEngine({})) == NO_PROMISE
    assert "298 questions are too few" in capsys.readouterr().out
    assert "needs 299" in calibration.report()
    assert not (calibration.out / "presets.yaml").exists()


def test_a_promise_that_only_full_depth_keeps_says_so(calibration: Calibration) -> None:
    assert calibration.run(FakeEngine(dict.fromkeys(range(300), 0.99))) == 0
    assert "Only full depth can promise it" in calibration.report()
    book = PresetBook.load(calibration.out / "presets.yaml", LOOPS)
    assert book.presets["agree-99"].controls["exit_threshold"] == 1


def test_several_promises_and_modes_have_presets_of_their_own(calibration: Calibration) -> None:
    options = ["--modes", "skip,exact", "--loss", "0.15,0.02", "--thresholds", "0.6,0.3"]
    assert calibration.run(FakeEngine(FEW_FAIL), *options) == 0
    presets = PresetBook.load(calibration.out / "presets.yaml", LOOPS).presets
    chosen = {
        name: (preset.controls["exit_threshold"], preset.controls["exit_mode"])
        for name, preset in presets.items()
        if name.startswith("agree")
    }
    assert chosen == {
        "agree-98": (0.6, "skip"),
        "agree-85": (0.3, "skip"),
        "agree-98-exact": (0.6, "exact"),
        "agree-85-exact": (0.3, "exact"),
    }


def test_every_rule_is_calibrated_in_its_own_unit(calibration: Calibration) -> None:
    options = ["--rules", "gate,margin,delta", "--loss", "0.02"]
    assert calibration.run(FakeEngine(FEW_FAIL), *options) == 0
    presets = PresetBook.load(calibration.out / "presets.yaml", LOOPS).presets
    chosen = {
        name: (preset.controls["exit_rule"], preset.controls["exit_threshold"])
        for name, preset in presets.items()
        if name.startswith("agree")
    }
    assert chosen == {
        "agree-98": ("gate", 0.35),
        "agree-98-margin": ("margin", 0.4),
        "agree-98-delta": ("delta", 0.8),
    }
    report = calibration.report()
    assert "bound at 98.33 %" in report, "three series share the confidence"
    table = report.split("## Every threshold, `delta skip`")[1].split("##")[0]
    tested = [line.split(" | ")[0].strip("| ") for line in table.splitlines() if "0" in line]
    assert tested == ["0", *THRESHOLDS["delta"].split(",")]
    assert "agree-98-margin: exit_rule margin, exit_threshold 0.4" in report


def test_a_rule_of_its_own_thresholds_goes_from_full_depth_on(calibration: Calibration) -> None:
    """The first that fails ends it, though cheaper ones look good."""
    options = ["--rules", "delta", "--thresholds", "1.9,0.5,0,1.7", "--loss", "0.02"]
    assert calibration.run(FakeEngine(FEW_FAIL), *options) == 0
    presets = PresetBook.load(calibration.out / "presets.yaml", LOOPS).presets
    assert presets["agree-98-delta"].controls["exit_threshold"] == 0.5
    rows = [line for line in calibration.report().splitlines() if line.startswith("| ")][2:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == ["0", "0.5", "1.7", "1.9"]


def test_against_expected_answers_only_what_full_depth_gets_right_can_be_lost(
    calibration: Calibration,
) -> None:
    """All expect n + 1; those of 0..19 is made something that neither answer is."""
    lines = [{"prompt": str(n), "expected": str(n + 1 if n >= 20 else -5)} for n in range(400)]
    (calibration.folder / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = ["--check", "expected", "--loss", "0.05", "--thresholds", "0.3"]
    assert calibration.run(FakeEngine(FEW_FAIL), *options) == 0
    assert "keep-95" in PresetBook.load(calibration.out / "presets.yaml", LOOPS).presets
    row = next(line for line in calibration.report().splitlines() if line.startswith("| 0.3"))
    lost, right = row.split(" | ")[2], row.split(" | ")[6]
    assert (lost, right) == ("10", "92.5")


def test_expected_answers_are_asked_of_every_line(
    calibration: Calibration, capsys: pytest.CaptureFixture[str]
) -> None:
    calibration.ask(3, expected=False)
    assert calibration.run(None, "--check", "expected") == 2
    assert "line 1: no expected" in capsys.readouterr().err


def test_questions_that_repeat_are_told(calibration: Calibration) -> None:
    calibration.ask(200)
    file = calibration.folder / "q.jsonl"
    file.write_text(f"{file.read_text()}\n{file.read_text()}")
    calibration.run(FakeEngine({}))
    assert "Only 200 of them are different" in calibration.report()


def test_a_killed_run_goes_on_where_it_was(calibration: Calibration, tmp_path: Path) -> None:
    options = ["--chunk", "100", "--thresholds", "0.5,0.3"]
    whole = FakeEngine(FEW_FAIL)
    assert calibration.run(whole, *options) == 0
    expected, report = calibration.lines(), calibration.report()
    assert whole.calls == 12

    calibration.out = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        calibration.run(FakeEngine(FEW_FAIL, dies_after=7), *options)
    with (calibration.out / "state.jsonl").open("a") as file:
        file.write('["skip 0.5 300", {"lost": [0, 0')  # what a kill while writing leaves
    rest = FakeEngine(FEW_FAIL)
    assert calibration.run(rest, *options) == 0
    assert rest.calls == 12 - 7
    assert (calibration.lines(), calibration.report()) == (expected, report)

    assert calibration.run(None, *options) == 0, "nothing was left to answer"


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--loss", "0.02"], "losses"),
        (["--confidence", "0.9"], "confidence"),
        (["--max-tokens", "8"], "max_tokens"),
        (["--thresholds", "0.5"], "thresholds"),
        (["--dtype", "bfloat16"], "engine options"),
    ],
)
def test_the_state_of_another_run_is_refused_by_name(
    options: list[str],
    name: str,
    calibration: Calibration,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert calibration.run(FakeEngine({})) == 0
    before = calibration.lines()
    assert calibration.run(None, *options) == 2
    assert re.search(rf"of another run: its {name} differs", capsys.readouterr().err)
    assert calibration.lines() == before


def test_other_questions_and_another_model_are_another_run(
    calibration: Calibration, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert calibration.run(FakeEngine({})) == 0
    calibration.ask(401)
    assert calibration.run(None) == 2
    assert "its questions differs" in capsys.readouterr().err
    calibration.ask(400)
    monkeypatch.setattr(command, "fingerprint", lambda *_: "another")
    assert calibration.run(None) == 2
    assert "its model differs" in capsys.readouterr().err


def test_a_file_that_is_no_state_is_refused_and_kept(
    calibration: Calibration, capsys: pytest.CaptureFixture[str]
) -> None:
    calibration.out.mkdir()
    file = calibration.out / "state.jsonl"
    file.write_text("mine\n")
    assert calibration.run(None) == 2
    assert "line 1: not a calibration's" in capsys.readouterr().err
    assert file.read_text() == "mine\n"


def test_two_runs_do_not_write_one_state(
    calibration: Calibration, capsys: pytest.CaptureFixture[str]
) -> None:
    calibration.out.mkdir()
    with opened(calibration.out / "state.jsonl", {}):
        assert calibration.run(None) == 2
    assert "another calibration is writing to it" in capsys.readouterr().err


def test_a_checkpoint_is_known_by_what_is_in_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = command.fingerprint(str(tmp_path), True)
    assert command.fingerprint(str(tmp_path), True) == before
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert command.fingerprint(str(tmp_path), True) != before
    assert command.fingerprint("org/model", False) == "org/model"


def test_a_bad_presets_file_or_model_is_refused_before_anything_is_answered(
    calibration: Calibration, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = calibration.folder / "presets.yaml"
    bad.write_text("presets: {deep: {max_loops: 5}}")
    assert calibration.run(None, "--presets", str(bad)) == 2
    assert "preset 'deep'" in capsys.readouterr().err
    assert cli.main(["calibrate", "/no/model", str(calibration.folder / "q.jsonl")]) == 2
    assert "/no/model: no such folder" in capsys.readouterr().err
    assert not calibration.out.exists()


def test_help_explains_the_command_and_the_servers_help_names_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["calibrate", "--help"])
    assert done.value.code == 0
    out = capsys.readouterr().out
    assert (
        "QUESTIONS.jsonl" in out and "--confidence" in out and "--tensor-parallel-size" not in out
    )


def test_a_folder_called_calibrate_is_served_as_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "calibrate").mkdir()
    assert cli.main(["./calibrate"]) == 2
    assert "./calibrate: no config.json" in capsys.readouterr().err
    assert checkpoint.SHIPPED_NAME == "ouro-mini"
