"""The installer: nothing twice, on where it stopped, and errors that name the fix."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts import install

LISTS = ("cpu.txt", "cuda.txt", "dev.txt", "kernels.txt", "kernels-oldest.txt")


@pytest.fixture
def done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The installer's doings, in a project of files only; no pip is run."""
    log: list[str] = []
    for name in (*LISTS, "torch-cpu.txt"):
        file = tmp_path / "requirements" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("torch==1.2.3\n" if name == "torch-cpu.txt" else "")
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "ouro_runtime").mkdir()
    (tmp_path / "ouro_runtime" / "__init__.py").write_text("")

    def make_venv(venv: Path) -> None:
        log.append("venv")
        install.python_of(venv).parent.mkdir(parents=True, exist_ok=True)
        install.python_of(venv).touch()

    def run_pip(venv: Path, *arguments: str, **options: object) -> int:
        log.append(" ".join(arguments))
        return 0

    monkeypatch.setattr(install, "ROOT", tmp_path)
    monkeypatch.setattr(install, "make_venv", make_venv)
    monkeypatch.setattr(install, "run_pip", run_pip)
    monkeypatch.setattr(install, "output", lambda command: "None")
    monkeypatch.setattr(install, "has_gpu", lambda: False)
    monkeypatch.setattr(install, "need_libraries", lambda: None)
    return log


def run(tmp_path: Path, *arguments: str) -> None:
    install.main(["--venv", str(tmp_path / "venv"), *arguments])


def test_second_run_does_nothing(tmp_path: Path, done: list[str]) -> None:
    run(tmp_path)
    assert [line.split()[-1] for line in done] == [
        "venv",
        "requirements/cpu.txt",
        "torch==1.2.3+cpu",
        ".",
    ]
    done.clear()
    run(tmp_path)
    assert done == []


def test_only_what_changed_is_done_again(tmp_path: Path, done: list[str]) -> None:
    run(tmp_path)
    done.clear()
    (tmp_path / "pyproject.toml").write_text("# changed")
    run(tmp_path)
    assert done == ["--no-deps --no-build-isolation -e ."]


def test_dev_adds_its_lists_and_serving_needs_them_no_more(tmp_path: Path, done: list[str]) -> None:
    run(tmp_path)
    done.clear()
    run(tmp_path, "--dev")
    assert done == [
        "--no-deps -r requirements/dev.txt",
        "--no-deps -r requirements/kernels.txt",
        f"--no-deps --target {tmp_path}/venv/triton-oldest -r requirements/kernels-oldest.txt",
    ]
    done.clear()
    run(tmp_path)
    assert done == []


def test_interrupted_run_goes_on_where_it_stopped(
    tmp_path: Path, done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    works = install.run_pip

    def fails_at_torch(venv: Path, *arguments: str, **options: object) -> int:
        return 1 if any("torch==" in a for a in arguments) else works(venv, *arguments)

    monkeypatch.setattr(install, "run_pip", fails_at_torch)
    with pytest.raises(SystemExit, match="PIP_FIND_LINKS"):
        run(tmp_path)
    assert done == ["venv", "--no-deps -r requirements/cpu.txt"]
    done.clear()
    monkeypatch.setattr(install, "run_pip", works)
    run(tmp_path)
    assert "requirements/cpu.txt" not in " ".join(done)
    assert done[-1].endswith("-e .")


def test_torch_is_looked_for_where_pip_is_configured_if_its_index_is_out_of_reach(
    tmp_path: Path, done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_index(venv: Path, *arguments: str, **options: object) -> int:
        done.append(" ".join(arguments))
        return 1 if "--index-url" in arguments else 0

    monkeypatch.setattr(install, "run_pip", no_index)
    run(tmp_path)
    assert install.CPU_INDEX in done[2]
    assert done[3] == "--no-deps torch==1.2.3"


def test_cuda_torch_is_refused_on_the_cpu_build(
    tmp_path: Path, done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "output", lambda command: "13.0")
    with pytest.raises(SystemExit, match=r"built for CUDA 13\.0"):
        run(tmp_path)
    assert done[-1] == "torch==1.2.3"  # taken out again, so that the next run looks again


def test_lost_venv_is_made_again(tmp_path: Path, done: list[str]) -> None:
    run(tmp_path)
    first = list(done)
    done.clear()
    install.python_of(tmp_path / "venv").unlink()
    run(tmp_path)
    assert done == first


def test_gpu_chooses_the_cuda_build(
    tmp_path: Path, done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "has_gpu", lambda: True)
    run(tmp_path)
    assert done == [
        "venv",
        "-r requirements/cuda.txt",
        "--no-deps --no-build-isolation -e .",
    ]


def test_two_builds_do_not_share_an_environment(tmp_path: Path, done: list[str]) -> None:
    run(tmp_path)
    with pytest.raises(SystemExit, match="make clean"):
        run(tmp_path, "--build", "cuda")


def test_project_can_be_left_out_and_added(tmp_path: Path, done: list[str]) -> None:
    """As the Dockerfiles do, so that a change of code does not install everything again."""
    run(tmp_path, "--no-project")
    assert "-e" not in " ".join(done)
    done.clear()
    run(tmp_path)
    assert done == ["--no-deps --no-build-isolation -e ."]


@pytest.mark.parametrize(
    ("status", "said", "expected"), [(0, "GPU 0: some", True), (9, "", False), (0, "", False)]
)
def test_gpu_is_one_that_its_driver_lists(
    monkeypatch: pytest.MonkeyPatch, status: int, said: str, expected: bool
) -> None:
    answer = subprocess.CompletedProcess([], status, said, "")
    monkeypatch.setattr(install.subprocess, "run", lambda *a, **k: answer)
    assert install.has_gpu() is expected


def test_no_driver_is_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not install.has_gpu()


def old_python(monkeypatch: pytest.MonkeyPatch, newer: str | None) -> None:
    monkeypatch.setattr(install.sys, "version_info", (3, 9, 1))
    monkeypatch.setattr(install.shutil, "which", lambda name: newer)


def test_old_python_names_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    old_python(monkeypatch, newer=None)
    with pytest.raises(SystemExit, match="PYTHON=python3"):
        install.need_python([])


def test_old_python_hands_over_to_a_newer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    old_python(monkeypatch, newer="/bin/python3.11")
    called: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(install.os, "execv", lambda path, argv: called.append((path, argv)))
    with pytest.raises(SystemExit):
        install.need_python(["--dev"])
    assert called[0][0] == "/bin/python3.11"
    assert called[0][1][2:] == ["--dev"]


def test_missing_library_names_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_there(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(install.ctypes, "CDLL", not_there)
    with pytest.raises(SystemExit, match="apt-get install libnuma1"):
        install.need_libraries()


def test_missing_compiler_is_said_and_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install.ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr(install.shutil, "which", lambda name: None)
    install.need_libraries()
    assert "install g++" in capsys.readouterr().out


def test_missing_venv_module_names_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(SystemExit, match="-venv"):
        install.make_venv(tmp_path)


def test_installer_starts_on_an_old_python() -> None:
    """It must get as far as its own message: no syntax newer than Python 3.8."""
    import ast

    ast.parse(Path(install.__file__).read_text(), feature_version=(3, 8))


@pytest.mark.parametrize("moves", [True, False])
def test_progress_says_what_is_going_on(
    moves: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = install.Progress()
    progress.moves = moves
    progress.EVERY_SECONDS = 0
    lines: list[str] = ["Collecting numpy==2.3.5 (from -r list)\n", "  Using cached numpy\n"]
    lines += ["Installing collected packages: numpy\n", "Successfully installed numpy-2.3.5\n"]
    show: Callable[[str], None] = progress.line
    for line in lines:
        show(line)
    progress.close()
    said = capsys.readouterr().out
    assert "package 1: numpy==2.3.5" in said
    assert "unpacking" in said
    assert ("\r" in said) == moves
