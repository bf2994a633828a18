"""Figures and the page of the load benchmark."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from benchmarks.load_client import CLASSES, Answer

HEAD = ("run", "requests", "p50, ms", "p95, ms", "first token p95, ms", "mean depth", "right, %")


def percentile(weighted: Sequence[tuple[float, int]], share: float) -> float | None:
    """The nearest-rank percentile of values that count so many times; None of nothing."""
    total = sum(count for _, count in weighted)
    seen = 0
    for value, count in sorted(weighted):
        seen += count
        if seen >= share * total:
            return value
    return None


def figures(answers: Sequence[Answer], since: float = 0.0) -> dict[str, Any]:
    """What the requests asked at `since` or later got. Times per token count by token."""
    asked = [a for a in answers if a.asked >= since]
    good = [a for a in asked if a.error is None]
    paces = [(p, a.tokens - 1) for a in good if (p := a.seconds_per_token) is not None]
    firsts = [(a.first - a.asked, 1) for a in good]
    depths = sum((a.depths for a in good), Counter[int]())
    return {
        "requests": len(asked),
        "answered": len(good),
        "errors": dict(Counter(a.error for a in asked if a.error is not None)),
        "tpot_p50_ms": _ms(percentile(paces, 0.5)),
        "tpot_p95_ms": _ms(percentile(paces, 0.95)),
        "first_token_p95_ms": _ms(percentile(firsts, 0.95)),
        "mean_depth": sum(d * n for d, n in depths.items()) / max(1, depths.total()),
        "right_percent": 100 * sum(a.right for a in good) / max(1, len(good)),
    }


def by_class(answers: Sequence[Answer], since: float = 0.0) -> dict[str, dict[str, Any]]:
    """The figures of each priority class."""
    return {
        name: figures([a for a in answers if a.priority_class == name], since) for name in CLASSES
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 3)


def markdown(result: dict[str, Any]) -> str:
    """The page."""
    load, target = result["load"], result["target_tpot_ms"]
    names = {"off": "no controller", "on": f"target {target:g} ms"}
    whole = [_row(names[run], result["runs"][run]["settled"]) for run in names]
    classes = [
        _row(f"{names[run]}, {name}", told)
        for run in names
        for name, told in result["runs"][run]["settled_by_class"].items()
    ]
    idle, full, floor = (result["calibration"][k] for k in ("idle", "full", "floors"))
    p95 = {run: result["runs"][run]["settled"]["tpot_p95_ms"] for run in names}
    lost = [result["runs"][run]["settled"]["right_percent"] for run in names]
    verdict = "holds" if p95["on"] <= target < p95["off"] else "DOES NOT HOLD"
    parts = [
        "# Depth by latency",
        result["facts"],
        (
            f"Saturated, the server answers {full['requests_per_second']:.1f} requests per second "
            f"at full depth (p95 {full['tpot_p95_ms']:.1f} ms per token) and "
            f"{floor['requests_per_second']:.1f} with every class at its floor "
            f"({floor['tpot_p95_ms']:.1f} ms); alone, a request gets a token every "
            f"{idle['tpot_p95_ms']:.1f} ms (p95). The load is {load['rate']:.1f} per second, "
            f"Poisson, for {load['seconds']:g} s; the target {target:g} ms."
        ),
        (
            f"**The target {verdict}**: p95 {p95['on']:.1f} ms with the controller, "
            f"{p95['off']:.1f} without. It costs {lost[0] - lost[1]:+.1f} points of right answers "
            f"({lost[1]:.1f} % instead of {lost[0]:.1f} %)."
        ),
        (
            f"Requests from second {load['settling']:g} on; times per token after the first, "
            "counted by token, as the client sees them."
        ),
        _table(HEAD, whole),
        "## By priority class",
        _table(HEAD, classes),
        "## The controller",
        _table(
            ("second", "p95, ms", "pressure", *(f"threshold, {name}" for name in CLASSES)),
            [
                (
                    f"{t['seconds']:.0f}",
                    "" if t["p95_ms"] is None else f"{t['p95_ms']:.1f}",
                    f"{t['pressure']:.2f}",
                    *(f"{t['thresholds'][name]:.2f}" for name in CLASSES),
                )
                for t in result["runs"]["on"]["trace"][:: load["every"]]
            ],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _row(name: str, told: dict[str, Any]) -> tuple[str, ...]:
    def ms(key: str) -> str:
        return "" if told[key] is None else f"{told[key]:.1f}"

    answered = told["answered"]
    asked = str(answered) if answered == told["requests"] else f"{answered} of {told['requests']}"
    times = (ms("tpot_p50_ms"), ms("tpot_p95_ms"), ms("first_token_p95_ms"))
    return (name, asked, *times, f"{told['mean_depth']:.2f}", f"{told['right_percent']:.1f}")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
