"""The Dockerfiles, as far as they can be checked without building them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = ["docker/Dockerfile", "docker/Dockerfile.cuda"]


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, rest) in order, continued lines joined, comments left out."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.partition(" ")[2]) for line in joined.splitlines() if line]


def all_of(name: str, kind: str) -> list[str]:
    return [rest for instruction, rest in instructions(name) if instruction == kind]


@pytest.mark.parametrize("name", FILES)
def test_base_image_is_pinned(name: str) -> None:
    (base,) = all_of(name, "FROM")
    assert re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+-\S+", base)


@pytest.mark.parametrize("name", FILES)
def test_runs_as_an_ordinary_user_from_before_the_install(name: str) -> None:
    kinds = [kind for kind, _ in instructions(name)]
    assert all_of(name, "USER") == ["ouro"]
    install = next(
        i for i, (_, rest) in enumerate(instructions(name)) if "scripts/install.py" in rest
    )
    assert kinds.index("USER") < install


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
