"""The plot of a report: loss with its bound against mean depth, as SVG."""

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

from ouro_server.calibrate.choose import Point
from ouro_server.calibrate.presets import Promise

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 50, 30, 50
APART = 26
"""Pixels between two labels; a point that is nearer to another one has none."""
COLOURS = ("#2d8f64", "#8a4fbf", "#b3541e", "#1f6fb2", "#8c7a00", "#a3316f")
"""By series, in the plan's order."""


class Axes:
    """Where a mean depth and a loss lie; losses on a logarithmic scale, with 0 at the foot."""

    def __init__(self, loops: int, least: float) -> None:
        self.loops = loops
        self.decades = math.floor(math.log10(least))
        self.foot = 10.0**self.decades

    def x(self, depth: float) -> float:
        share = (depth - 1) / max(1, self.loops - 1)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, loss: float) -> float:
        share = math.log10(max(loss, self.foot)) / self.decades
        return TOP + share * (HEIGHT - TOP - BOTTOM)


def draw(points: Mapping[str, Sequence[Point]], promises: Sequence[Promise], loops: int) -> str:
    """An SVG document; a point is filled where a promise covers it."""
    bounds = {p.series.name: p.choice.bounds for p in promises}
    every = [b for bound in bounds.values() for b in bound] + [p.choice.loss for p in promises]
    axes = Axes(loops, min(0.09, *every) / 4)
    parts = _frame(axes)
    for loss in sorted({promise.choice.loss for promise in promises}):
        y = axes.y(loss)
        parts.append(_line(LEFT, y, WIDTH - RIGHT, y, "#c0392b", "6 4"))
        parts.append(_text(WIDTH - RIGHT - 4, y - 5, f"promise {100 * loss:g} %", "end", "#c0392b"))
    for place, (name, seen) in enumerate(points.items()):
        passed = [p.choice.passed for p in promises if p.series.name == name]
        colour = COLOURS[place]
        parts.append(_text(LEFT + 95 * place, TOP - 12, name, "start", colour))
        parts += _curve(axes, seen, bounds[name], passed, colour)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" font-size="12">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _frame(axes: Axes) -> list[str]:
    foot = HEIGHT - BOTTOM
    parts = []
    for depth in range(1, axes.loops + 1):
        x = axes.x(depth)
        parts += [_line(x, TOP, x, foot, "#dddddd"), _text(x, foot + 18, str(depth), "middle")]
    for power in range(axes.decades, 1):
        y = axes.y(10.0**power)
        label = "0" if power == axes.decades else f"{10.0 ** (power + 2):g}"
        parts += [_line(LEFT, y, WIDTH - RIGHT, y, "#dddddd"), _text(LEFT - 8, y + 4, label, "end")]
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(_text(middle, HEIGHT - 12, "mean depth (label: threshold)", "middle"))
    turned = f'transform="rotate(-90 18 {foot / 2:.0f})"'
    parts.append(_text(18, foot / 2, "lost, % (bar: to its bound)", "middle", more=turned))
    return parts


def _curve(
    axes: Axes,
    points: Sequence[Point],
    bounds: Sequence[float],
    passed: Sequence[int],
    colour: str,
) -> list[str]:
    """One series' points, of which each promise chose the last of so many that `passed`. Those that
    were chosen are labelled before the others."""
    parts: list[str] = []
    labelled: list[float] = []
    for place in sorted(range(len(points)), key=lambda place: place + 1 not in passed):
        point, bound = points[place], bounds[place]
        x, y, top = axes.x(point.mean_depth), axes.y(point.loss), axes.y(bound)
        fill = colour if place < max(passed) else "white"
        parts += [
            _line(x, y, x, top, colour),
            _line(x - 4, top, x + 4, top, colour),
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{fill}" stroke="{colour}"/>',
        ]
        if all(abs(x - other) >= APART for other in labelled):
            labelled.append(x)
            parts.append(_text(x + 6, top - 4, f"{point.threshold:g}", "start", colour))
    return parts


def _line(x: float, y: float, to_x: float, to_y: float, colour: str, dashes: str = "") -> str:
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return (
        f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" '
        f'stroke="{colour}"{dashed}/>'
    )


def _text(
    x: float, y: float, text: str, anchor: str, colour: str = "#333333", more: str = ""
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" {more}>'
        f"{escape(text)}</text>"
    )
