"""Tables of the documentation against what they tell of."""

from __future__ import annotations

import json
import math
import re

from ouro_server.agreement import Rule
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


def test_operations_shows_the_kept_storm() -> None:
    kept = (ROOT / "benchmarks/results/storm.md").read_text()
    assert kept in (ROOT / "docs/operations.md").read_text()
    parts = json.loads((ROOT / "benchmarks/results/storm.json").read_text())["parts"]
    assert not [part for part in parts if part["broken"]]
    sent = {part["part"]: part["sent"] for part in parts}
    assert sent["mutated requests"] >= 10_000 and sent["abandoned streams"] >= 1_000


def test_audits_say_how_many_a_rung_takes() -> None:
    rows = re.findall(r"^\| (0\.\d+) \| (\d+) \|$", (ROOT / "docs/audits.md").read_text(), re.M)
    assert len(rows) == 4
    for target, audits in rows:
        assert Rule(float(target)).audits(0) == int(audits), target


PRESETS = PresetBook.load(SHIPPED, loops=4).presets


def test_depth_shows_the_shipped_presets() -> None:
    shown = first_cells("docs/depth.md", "|".join(PRESETS))[: len(PRESETS)]
    assert [(name, float(value)) for name, value in shown] == [
        (name, preset.controls["exit_threshold"]) for name, preset in PRESETS.items()
    ]
    assert all(
        preset.controls.keys() == {"exit_threshold", "exit_rule"} for preset in PRESETS.values()
    )


def test_depth_shows_what_each_preset_measured() -> None:
    """The table of the frontier is that of the kept `make quality` run."""
    measured = json.loads((ROOT / "benchmarks/results/quality.json").read_text())["results"]
    skip = {
        run["exit_threshold"]: run
        for run in measured
        if (run["gate"], run["exit_rule"]) == ("shipped", "gate")
        and (run["exit_mode"], run["max_loops"]) == ("skip", 4)
    }
    rows = re.findall(
        rf"^\| `({'|'.join(PRESETS)})` ((?:\| [\d.]+ ){{6}})\|$",
        (ROOT / "docs/depth.md").read_text(),
        re.MULTILINE,
    )
    assert [name for name, _ in rows] == list(PRESETS)
    for name, cells in rows:
        run = skip[PRESETS[name].controls["exit_threshold"]]
        hardest = {cell["family"]: cell["accuracy"] for cell in run["cells"]}
        expected = [f"{run['mean_depth']:.2f}", f"{run['accuracy']:.1f}"]
        expected += [f"{hardest[family]:.1f}" for family in ("sum", "mod", "chain", "cups")]
        assert cells.strip("| ").split(" | ") == expected


def test_depth_shows_what_each_rule_measured() -> None:
    """Every row is a point of the kept `make quality` run."""
    measured = json.loads((ROOT / "benchmarks/results/quality.json").read_text())["results"]
    kept = {
        (run["exit_rule"], run["exit_threshold"]): (run["mean_depth"], run["accuracy"])
        for run in measured
        if (run["gate"], run["exit_mode"], run["max_loops"]) == ("shipped", "skip", 4)
    }
    text = (ROOT / "docs/depth.md").read_text()
    rows = re.findall(r"^\| `(\w+)` at ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    assert {rule for rule, *_ in rows} == {"gate", "margin", "delta"}
    for rule, threshold, depth, right in rows:
        assert (depth, right) == tuple(
            f"{value:.{digits}f}"
            for value, digits in zip(kept[rule, float(threshold)], (2, 1), strict=True)
        )


def test_figures_of_a_gpu_are_the_kept_ones() -> None:
    rows = json.loads((ROOT / "benchmarks/results/gpu-nvidia-h200.json").read_text())["rows"]
    kept: dict[tuple[int, int], dict[float, str]] = {}
    for row in (row for row in rows if "rate" in row):
        ours = row["engine"] == "ours"
        gain = f" ({row['over_baseline']:.2f}x)" if ours else ""
        place = kept.setdefault((row["batch"], row["context"]), {})
        place[row["depth"] if ours else math.inf] = f"{row['rate']:,.0f}{gain}"
    lines = [
        f"| {batch} | {context:,} | {' | '.join(cells[d] for d in sorted(cells, reverse=True))} |"
        for (batch, context), cells in kept.items()
    ]
    assert len(lines) >= 7
    for document in ("README.md", "docs/cuda.md"):
        assert "\n".join(lines) in (ROOT / document).read_text(), document


def test_figures_of_drafts_are_the_kept_ones() -> None:
    measured = json.loads((ROOT / "benchmarks/results/lossless.json").read_text())
    never, mostly = (
        {row["batch"]: row for row in measured[name]["rows"] if row["setting"] == "lossless"}
        for name in ("mid", "mid-settled")
    )
    shares = measured["mid-settled"]["agreeing_read_outs"].values()
    assert f"{min(shares):.0%}, {max(shares):.0%}" == "92%, 97%"
    lines = [
        f"| {batch} | {row['full_tokens_per_second']:.1f} | {never[batch]['over_full']:.2f}x | "
        f"{row['tokens_per_second']:.1f} ({row['over_full']:.2f}x) |"
        for batch, row in mostly.items()
    ]
    assert len(lines) == 3
    assert "\n".join(lines) in (ROOT / "README.md").read_text()


def test_figures_of_bits_are_the_kept_ones() -> None:
    measured = json.loads((ROOT / "benchmarks/results/bits.json").read_text())
    rates = {
        (row["computes_in"], row["format"], row["batch"]): row["rate"] for row in measured["speed"]
    }
    text = " ".join((ROOT / "docs/operations.md").read_text().split())
    for batch in (1, 8, 32):
        plain = rates["float32", "as stored, 32 bits", batch]
        assert f"{rates['float32', 'w8a8', batch]:.1f}" in text, batch
        assert f"instead of {plain:.1f} at" in text, batch
    right = {row["right"] for row in measured["answers"] if row["format"] != "w4a16"}
    assert {f"{value:.1f}" for value in right} == {"98.7"}
    assert "98.7 % with 32 and with 8 bits in every mode" in text
