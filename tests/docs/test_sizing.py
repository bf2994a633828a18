"""The K/V tables of docs/operations.md against the server's own arithmetic."""

from __future__ import annotations

import json
import re

import pytest

from ouro_server.checkpoint import full_request_bytes
from tests.docs.blocks import ROOT

GIB = 2**30
UTILIZATION, OVERHEAD = 0.92, 2 * GIB
PARAMETERS = {"Ouro-1.4B": 1_434_652_673, "Ouro-2.6B": 2_667_974_657}
LAYERS = {"Ouro-1.4B": 24, "Ouro-2.6B": 48}
CONTEXTS = (1024, 4096, 16384, 65536)

TEXT = (ROOT / "docs/operations.md").read_text()
ROWS = [
    [cell.strip() for cell in row.split("|")[1:-1]]
    for row in re.findall(r"^\| Ouro-.*$", TEXT, re.MULTILINE)
]
BY_MODEL = [row for row in ROWS if len(row) == 4]
BY_CARD = [row for row in ROWS if len(row) == 7]


def config(model: str) -> dict[str, int]:
    """What the released config.json says of K/V."""
    return {
        "total_ut_steps": 4,
        "num_hidden_layers": LAYERS[model],
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "hidden_size": 2048,
        "max_position_embeddings": 65536,
    }


def test_both_tables_are_there() -> None:
    assert [row[0] for row in BY_MODEL] == list(PARAMETERS)
    assert len(BY_CARD) == 3 * len(PARAMETERS)


@pytest.mark.parametrize("row", BY_MODEL, ids=" ".join)
def test_model_table(row: list[str]) -> None:
    model, weights, per_token, longest = row
    assert weights == f"{2 * PARAMETERS[model] / GIB:.2f} GiB"
    assert per_token == f"{full_request_bytes(config(model), 1) / 1024:,.0f} KiB"
    assert longest == f"{full_request_bytes(config(model)) / GIB:.0f} GiB"


@pytest.mark.parametrize("row", BY_CARD, ids=" ".join)
def test_card_table(row: list[str]) -> None:
    model, card, pool, *requests = row
    left = UTILIZATION * int(card.split()[0]) * GIB - 2 * PARAMETERS[model] - OVERHEAD
    assert pool == f"{left / GIB:.1f} GiB"
    fit = [int(left // full_request_bytes(config(model), context)) for context in CONTEXTS]
    assert requests == [str(number) for number in fit]


def test_what_a_pool_holds_is_what_was_measured() -> None:
    """By setting, and at least what pages by loop are for."""
    measured = json.loads((ROOT / "benchmarks/results/capacity.json").read_text())
    found = {(row["setting"], row["length"]): row["requests"] for row in measured["rows"]}
    rows = {"full": "full, `exact`", "max_loops 2": "`max_loops: 2`", "shared": "`shared`"}
    for setting, name in rows.items():
        (row,) = re.findall(rf"^\| {re.escape(name)}[^|]*\|[^|]*\|(.*)\|$", TEXT, re.MULTILINE)
        for cell, length in zip(row.split("|"), (1024, 4096), strict=True):
            ratio = found[setting, length] / found["full", length]
            assert cell.strip() == f"{found[setting, length]} ({ratio:.2f}x)"
            assert ratio >= {"full": 1, "max_loops 2": 1.95, "shared": 3.7}[setting]
    for length in (1024, 4096):
        assert found["exact", length] == found["skip 1.0", length] == found["full", length]
    assert f"a pool of {measured['pages']:,} pages" in TEXT


def test_what_folded_blocks_save_is_what_was_measured() -> None:
    measured = json.loads((ROOT / "benchmarks/results/folding.json").read_text())["rows"]
    rows = re.findall(r"^\| (0\.[35]) \| ([^|]*) \| ([^|]*) \| (.*) \|$", TEXT, re.MULTILINE)
    assert len(rows) == len(measured) == 6
    for (threshold, text, depth, cells), row in zip(rows, measured, strict=True):
        assert (float(threshold), depth) == (row["threshold"], f"{row['depth']:.2f}")
        assert text.startswith(row["text"])
        for cell, found in zip(cells.split(" | "), row["blocks"].values(), strict=True):
            if not found["saved"]:
                assert cell.startswith("none")
                continue
            assert f"{100 * found['saved']:.1f} %" in cell
            assert row["text"].endswith("are") or cell.startswith(f"{found['pages']:.2f}")
