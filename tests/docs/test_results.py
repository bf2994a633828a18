"""Kept results: they tell of a machine by its processor, and of nothing that is only there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.docs.blocks import ROOT

KEPT = sorted((ROOT / "benchmarks/results").glob("*.json"))


def texts(value: Any) -> Iterator[str]:
    """Every key and text in a JSON value."""
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from texts(one)
    elif isinstance(value, str):
        yield value


@pytest.mark.parametrize("file", KEPT, ids=lambda file: file.stem)
def test_no_path_of_the_machine_is_kept(file: Path) -> None:
    assert len(KEPT) >= 10
    assert not [text for text in texts(json.loads(file.read_text())) if text.startswith("/")]
