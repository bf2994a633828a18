"""The fleet's arithmetic in docs/cluster.md is what the simulator says."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from tests.docs.blocks import ALL, ROOT

TEXT = (ROOT / "docs/cluster.md").read_text()
(COMMAND,) = (c for c in ALL if "ouro_runtime.loop.simulate" in c.words)
ROWS = [
    [cell.strip() for cell in row.split("|")[1:-1]]
    for row in re.findall(r"^\| (?:full|`\w+`) \| `--mean-depth .*$", TEXT, re.MULTILINE)
]
MEASURED = json.loads((ROOT / "benchmarks/results/gpu-nvidia-h200.json").read_text())["rows"]


def at(batch: int, depth: float) -> float:
    """Measured tokens a second of ours at 1,024 positions."""
    (row,) = (
        row
        for row in MEASURED
        if (row["engine"], row.get("batch"), row.get("context"), row.get("depth"))
        == ("ours", batch, 1024, depth)
    )
    return row["rate"]


@pytest.mark.parametrize("row", ROWS, ids=" ".join)
def test_the_row_is_simulated(row: list[str]) -> None:
    mode, options, tokens, requests, measured = row
    words = COMMAND.words
    command = [sys.executable, *words[1 : words.index("--mean-depth")], *options.strip("`").split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"mode {'skip' if mode == 'full' else mode.strip('`')}\n" in done.stdout
    number = tokens.replace(",", "")
    assert f"tokens a second {number}, requests a second {requests}\n" in done.stdout
    if measured[:1].isdigit():
        assert measured == f"{at(32, float(options.strip('`').split()[1])):,.0f}"
        assert float(number) == pytest.approx(float(measured.replace(",", "")), rel=0.03)


def test_every_mode_has_a_row() -> None:
    assert {row[0] for row in ROWS} == {"full", "`skip`", "`exact`", "`lossless`"}


def test_the_two_numbers_are_the_measured_ones() -> None:
    words = COMMAND.words
    one, many = (1000 * batch / at(batch, 4.0) / 4 for batch in (1, 32))
    assert float(words[words.index("--pass-ms") + 1]) == pytest.approx(one, abs=5e-4)
    assert float(words[words.index("--row-cost") + 1]) == pytest.approx(
        (many / one - 1) / 31, abs=5e-4
    )
