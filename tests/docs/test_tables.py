"""Tables of the documentation against what they tell of."""

from __future__ import annotations

import re

from ouro_server.presets import SHIPPED, PresetBook
from tests.docs.blocks import ROOT
from tests.observability.expressions import of_rules


def first_cells(document: str, name: str) -> list[tuple[str, str]]:
    """(first cell, second cell) of the rows whose first cell is code that matches `name`."""
    text = (ROOT / document).read_text()
    return re.findall(rf"^\| `({name})` \| ([^|]*) \|", text, re.MULTILINE)


def test_operations_explains_every_alert() -> None:
    explained = [alert for alert, _ in first_cells("docs/operations.md", r"Ouro\w+")]
    assert explained == list(of_rules())


def test_depth_shows_the_shipped_presets() -> None:
    presets = PresetBook.load(SHIPPED, loops=4).presets
    shown = dict(first_cells("docs/depth.md", "|".join(presets)))
    assert {name: {"exit_threshold": float(value)} for name, value in shown.items()} == {
        name: preset.controls for name, preset in presets.items()
    }
