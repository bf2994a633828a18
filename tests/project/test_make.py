"""The commands people are told to type exist and stay what they are said to be."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from scripts.run_tests import ENGINES, run_all, runs, stages

ROOT = Path(__file__).resolve().parent.parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z][a-z-]*):(?!=)", MAKEFILE, re.MULTILINE))
SETTINGS = set(re.findall(r"^([A-Z]+) \?=", MAKEFILE, re.MULTILINE))
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "benchmarks").rglob("*.md"),
]


def make(*arguments: str) -> str:
    """What make would run."""
    # The suite itself may run under make, which hands its own settings down.
    clean = {k: v for k, v in os.environ.items() if k not in SETTINGS and not k.startswith("MAKE")}
    command = ["make", "--dry-run", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_targets_that_exist(document: Path) -> None:
    if not document.exists():
        pytest.skip("not written yet")
    text = document.read_text()
    code = re.findall(r"`([^`\n]+)`", text) + re.findall(r"```.*?\n(.*?)```", text, re.DOTALL)
    named = {
        target
        for part in code
        for target in re.findall(r"(?:^|[\s;&(])make ([a-z][a-z-]*)", f" {part}")
    }
    assert named <= TARGETS


def test_help_lists_every_target_meant_for_people() -> None:
    listed = set(re.findall(r"^([a-z-]+):.*##", MAKEFILE, re.MULTILINE))
    assert TARGETS - listed == {"install-dev"}


def test_every_target_is_phony() -> None:
    """A folder called `server` or `bench` must not make a target look done."""
    phony = MAKEFILE.partition(".PHONY:")[2].replace("\\\n", " ").split("\n")[0].split()
    assert set(phony) == TARGETS


@pytest.mark.parametrize("module", re.findall(r"-m ([a-z_.]+) \$\(ARGS\)", MAKEFILE))
def test_targets_run_modules_that_exist(module: str) -> None:
    path = ROOT / module.replace(".", "/")
    assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


def test_serve_hands_its_settings_over() -> None:
    said = make("serve", "PORT=9", "HOST=::1", "MODEL=/m", "ARGS=--max-loops 2", "PYTHON=py")
    assert "py scripts/install.py" in said
    assert "ouro-serve /m --host ::1 --port 9 --max-loops 2" in said
    assert "ouro-serve  --host 127.0.0.1 --port 8000" in make("serve")


def test_ci_runs_the_tests_and_can_fail(tmp_path: Path) -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    for failing in ("check", "test", "none"):
        fake = tmp_path / "make"
        fake.write_text(f'#!/bin/sh\necho "ran $1"\n[ "$1" != {failing} ]\n')
        fake.chmod(0o755)
        path = f"{tmp_path}:{os.environ['PATH']}"
        done = subprocess.run(
            [script], capture_output=True, text=True, env={**os.environ, "PATH": path}
        )
        assert "ran check" in done.stdout
        assert "ran test" in done.stdout
        assert (done.returncode == 0) == (failing == "none")


def test_every_test_runs_in_exactly_one_stage() -> None:
    tests = ROOT / "tests"
    planned = [Path(path) for paths in stages(tests).values() for path in paths]
    assert len(planned) == len(set(planned))
    for file in tests.rglob("test_*.py"):
        assert sum(file.is_relative_to(path) for path in planned) == 1, file


def test_stages_keep_kernels_and_engines_apart(tmp_path: Path) -> None:
    engines = [name for names in ENGINES.values() for name in names]
    for name in ("kernels", "model", "empty", *engines):
        (tmp_path / name).mkdir()
        if name != "empty":
            (tmp_path / name / "test_it.py").write_text("")
    (tmp_path / "test_loose.py").write_text("")
    plan = stages(tmp_path)
    assert list(plan) == [*ENGINES, "kernels", "quick"]
    assert plan["quick"] == [str(tmp_path / "test_loose.py"), str(tmp_path / "model")]
    assert plan["kernels"] == [str(tmp_path / "kernels")]
    for name, folders in ENGINES.items():
        assert plan[name] == [str(tmp_path / folder) for folder in folders]


def test_kernels_run_again_with_the_oldest_triton(tmp_path: Path) -> None:
    plan = {"engines": ["e"], "kernels": ["k"], "quick": ["a"]}
    assert [run.name for run in runs(plan, tmp_path / "none")] == list(plan)
    found = runs(plan, tmp_path)
    assert [run.paths for run in found] == [["e"], ["k"], ["k"], ["a"]]
    paths = [run.environment.get("PYTHONPATH", "").split(os.pathsep)[0] for run in found]
    assert [path == str(tmp_path) for path in paths] == [False, False, True, False]


@pytest.mark.parametrize("at_once", [1, 2])
def test_every_stage_runs_and_a_failure_is_told(
    at_once: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "test_good.py", tmp_path / "test_bad.py"
    good.write_text("def test_it(): pass\n")
    bad.write_text("def test_it(): assert 0, 'so it is'\n")
    found = runs({"a": [str(good)], "b": [str(bad)], "c": [str(good)]}, tmp_path / "none")
    run_all(list(found), ["-p", "no:cacheprovider"], at_once)
    assert [run.passed for run in found] == [True, False, True]
    said = capsys.readouterr().out
    assert "== c tests" in said and "so it is" in said
