"""The Dockerfiles, as far as they can be checked without building them.

`scripts/try_dockerfile.py` tries every step, which takes minutes and root; not here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import install
from scripts.try_dockerfile import Instruction, instructions

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = ["docker/Dockerfile", "docker/Dockerfile.cuda"]


def steps(name: str) -> list[Instruction]:
    return list(instructions((ROOT / name).read_text()))


def all_of(name: str, kind: str) -> list[str]:
    return [step.rest for step in steps(name) if step.kind == kind]


@pytest.mark.parametrize("name", FILES)
def test_the_linter_has_nothing_to_say(name: str) -> None:
    places = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    hadolint = shutil.which("hadolint", path=places)
    assert hadolint, "make install-dev brings it"
    said = subprocess.run([hadolint, ROOT / name], capture_output=True, text=True)
    assert (said.returncode, said.stdout) == (0, "")


@pytest.mark.parametrize("name", FILES)
def test_base_image_is_pinned(name: str) -> None:
    (base,) = all_of(name, "FROM")
    assert re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+-\S+", base)


@pytest.mark.parametrize("name", FILES)
def test_runs_as_an_ordinary_user_from_before_the_install(name: str) -> None:
    kinds = [step.kind for step in steps(name)]
    first = next(i for i, step in enumerate(steps(name)) if "scripts/install.py" in step.rest)
    assert kinds.index("USER") < first
    (user,) = all_of(name, "USER")
    uid = user.split(":")[0]
    assert int(uid) > 0
    assert any(f"--uid {uid} " in command for command in all_of(name, "RUN"))


@pytest.mark.parametrize("name", FILES)
def test_health_is_asked_where_the_server_listens(name: str) -> None:
    (check,) = all_of(name, "HEALTHCHECK")
    (entry,) = all_of(name, "ENTRYPOINT")
    (port,) = all_of(name, "EXPOSE")
    assert f"http://127.0.0.1:{port}/health" in check
    assert f'"--port", "{port}"' in entry
    assert '"ouro-serve", "--host", "0.0.0.0"' in entry


@pytest.mark.parametrize("name", FILES)
def test_everything_copied_is_there_and_in_the_context(name: str) -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignore[0] == "*"
    for copied in all_of(name, "COPY"):
        *sources, _ = [part for part in copied.split() if not part.startswith("--")]
        for source in sources:
            assert (ROOT / source).exists(), source
            assert f"!{source}" in ignore, source


@pytest.mark.parametrize(("name", "build"), [(FILES[0], "cpu"), (FILES[1], "cuda")])
def test_installs_as_make_install_does(name: str, build: str) -> None:
    runs = [rest for rest in all_of(name, "RUN") if "install.py" in rest]
    assert [run.rpartition("install.py ")[2] for run in runs] == [
        f"--build {build} --no-project",
        f"--build {build}",
    ]
    assert "scripts/install.py" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("name", FILES)
def test_commands_are_valid_shell(name: str) -> None:
    for command in all_of(name, "RUN"):
        subprocess.run(["sh", "-n", "-c", command], check=True)


def test_the_packages_exist() -> None:
    """On Debian, with the lists of packages at hand; docker/Dockerfile's base is a Debian too."""
    (command,) = [run for run in all_of(FILES[0], "RUN") if "apt-get install" in run]
    if not shutil.which("apt-get") or not any(Path("/var/lib/apt/lists").glob("*_Packages*")):
        pytest.skip("no lists of Debian packages here (apt-get update)")
    install_command = command.split("&&")[1].split()
    done = subprocess.run([*install_command, "--simulate"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_context_holds_what_the_last_install_needs(tmp_path: Path) -> None:
    """The last RUN, as it stands, in a folder that has what COPY brings and nothing else. The
    packages before it are this environment's, and said to be installed."""
    for copied in all_of(FILES[0], "COPY"):
        *sources, target = [part for part in copied.split() if not part.startswith("--")]
        for source in sources:
            into = tmp_path / target / source if target.endswith("/") else tmp_path / target
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, into, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, into)
    venv = tmp_path / ".venv"
    install.make_venv(venv)
    stamp = install.Stamp(venv)
    for step in install.plan("cpu", project=False):
        stamp.add(step)

    packages = next(path for path in sys.path if path.endswith("site-packages"))
    path = f"{venv / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        all_of(FILES[0], "RUN")[-1],
        shell=True,
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "PYTHONPATH": packages},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    program = json.loads(all_of(FILES[0], "ENTRYPOINT")[0])[0]
    assert (venv / "bin" / program).exists()
    for package in ("ouro_server", "ouro_runtime", "ouro_kernels"):
        where = f"import importlib.util as u; print(u.find_spec({package!r}).origin)"
        told = subprocess.run(
            [venv / "bin/python", "-I", "-c", where], capture_output=True, text=True
        )
        assert Path(told.stdout.strip()).is_relative_to(tmp_path), told.stderr
