"""The benchmark's tables, as plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns aligned to the right, in Markdown."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    print("\n".join([lines[0], rule, *lines[1:]]), flush=True)


def print_checks(result: dict[str, Any]) -> None:
    """What was compared before anything was measured."""
    machine, golden = result["machine"], result["golden_float32"]
    print(
        f"{machine['cpu']}, {machine['cpus']} cores; {machine['threads']} thread(s) each, "
        f"on core(s) {machine['cores']}; vLLM {machine['vllm']}, torch {machine['torch']}; "
        f"load {machine['load_at_start']} at the start"
    )
    print(
        f"float32, golden checkpoint, full depth: both engines give all {golden['tokens']} golden "
        f"tokens of {golden['prompts']} prompts"
    )
    agreement = result["full_depth_agreement"]
    print(
        f"measured checkpoint, full depth: {agreement['equal']} of 8 answers equal, "
        f"{agreement['agreement']:.0%} of tokens before a first difference",
        flush=True,
    )


def print_batches(batches: Sequence[dict[str, Any]]) -> None:
    """The main table."""
    rows = []
    for batch in batches:
        for row in batch["rows"]:
            rows.append(
                (
                    batch["batch"],
                    row["depth"],
                    f"{row['tokens_per_second']:.1f}",
                    f"{batch['baseline_tokens_per_second']:.1f}",
                    f"{row['over_baseline']:.2f}",
                    f"{row['loops_over_depth']:.2f}",
                    f"{row['over_full']:.2f}",
                    f"{row['bound']:.2f}",
                    f"{row['of_bound']:.2f}",
                    f"{row['reachable']:.2f}",
                    f"{row['of_reachable']:.2f}",
                )
            )
    print()
    print_table(
        (
            "batch",
            "mean depth",
            "tokens/s",
            "baseline",
            "over baseline",
            "T / depth",
            "over own full",
            "bound",
            "of bound",
            "reachable",
            "of reachable",
        ),
        rows,
    )
    fits = ", ".join(f"{b['batch']}: {b['f0_ms']:.1f} + d x {b['f1_ms']:.1f}" for b in batches)
    print(f"a step of one token each at fixed depth d, by batch, ms (F0 + d F1): {fits}")


def print_extras(result: dict[str, Any]) -> None:
    """Mixed company."""
    print("\ntwo requests of different thresholds in one batch:")
    for row in result["thresholds"]:
        print(
            f"  threshold {row['exit_threshold']:g}: mean depth {row['mean_depth']:.2f}, "
            f"{row['tokens_per_second']:.1f} tokens/s"
        )
    neighbours = result["neighbours"]
    print(
        f"a full-depth request among {neighbours['batch'] - 1} neighbours of mean depth "
        f"{neighbours['neighbours_mean_depth']:g} is slower by {neighbours['slowdown']:+.1%} than "
        f"among full-depth ones; without the products with the vocabulary, which are then paid in "
        f"every pass, by {neighbours['slowdown_without_read_out']:+.1%}"
    )


def print_profiles(profiles: Sequence[dict[str, Any]]) -> None:
    """Where a pass goes."""
    names = [name for name in profiles[0] if name.endswith("_ms")]
    print(f"\na pass at batch {profiles[0]['batch']}, ms:")
    print_table(
        (
            "mean depth",
            *(name[:-3] for name in names),
            "outside block and lm_head",
            "rows / pass",
            "tokens / step",
        ),
        [
            (
                f"{profile['mean_depth']:g}",
                *(f"{profile[name]:.2f}" for name in names),
                f"{profile['outside_block_share']:.1%}",
                f"{profile['rows_per_pass']:.1f}",
                f"{profile['tokens_per_step']:.1f}",
            )
            for profile in profiles
        ],
    )
