"""The table of seams in CONTRIBUTING.md is complete, and names what the files override."""

from __future__ import annotations

import ast
import re

from tests.docs.blocks import ROOT

ENGINE = ROOT / "ouro_runtime/engine"
ROW = re.compile(r"^\| `((?:cpu/|cuda/)?\w+\.py)` \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)
ROWS = {
    file: (what, harm) for file, what, harm in ROW.findall((ROOT / "CONTRIBUTING.md").read_text())
}
LONGEST_WALK = 6


def seams() -> set[str]:
    """Files whose docstring says that they are one."""
    found = set()
    for path in ENGINE.rglob("*.py"):
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        if docstring.startswith("Seam"):
            found.add(path.relative_to(ENGINE).as_posix())
    return found


def test_every_seam_has_its_row() -> None:
    assert set(ROWS) == seams()


def test_a_row_names_what_its_file_holds() -> None:
    """Names in code are in the file; what would break is said in words."""
    for file, (what, harm) in ROWS.items():
        text = (ENGINE / file).read_text()
        for code in re.findall(r"`([^`]+)`", what):
            for name in code.split("."):
                assert name in text, f"{file} does not speak of {name}"
        assert len(harm.split()) >= 3, file


def test_a_tokens_way_through_a_wing_is_short_and_named() -> None:
    for wing in ("cpu", "cuda"):
        docstring = ast.get_docstring(ast.parse((ENGINE / wing / "__init__.py").read_text())) or ""
        named = re.findall(r"`(\w+)`", docstring)
        assert 3 <= len(named) <= LONGEST_WALK
        for name in named:
            assert (ENGINE / wing / f"{name}.py").is_file(), name
