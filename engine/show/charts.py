"""Line and stacked-area charts as inline SVG: no scripts, no outside files, colours from the page's CSS.

Every chart has a text alternative that says where each line starts and ends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

Points = Sequence[tuple[float, float]]
"""(step, value), steps rising."""

WIDTH, HEIGHT = 480, 240
LEFT, RIGHT, TOP, BOTTOM = 60, 14, 12, 32
NUM_COLOURS = 6
SMOOTH_FROM = 24
"""Lines with at least this many points are drawn smoothed, over a faint line of what was measured."""


class Scale(NamedTuple):
    """Maps data to the drawing area."""

    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0 or 1) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0 or 1) * (HEIGHT - TOP - BOTTOM)

    def path(self, points: Points) -> str:
        return "M" + "L".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that cover [low, high]: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        low, high = low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def tick_label(value: float) -> str:
    """Short: `0.25`, `12k`, `2.5e-4`."""
    if abs(value) < 1e-12:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1000:.4g}k"
    return f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.1e}".replace("e-0", "e-")


def smooth(points: Points) -> list[tuple[float, float]]:
    """Mean over a centred window of about a tenth of the points, so that a rise is not shown late."""
    half = max(1, len(points) // 20)
    windows = ((x, points[max(0, i - half) : i + half + 1]) for i, (x, _) in enumerate(points))
    return [(x, sum(y for _, y in window) / len(window)) for x, window in windows]


def line_chart(title: str, series: Mapping[str, Points], *, from_zero: bool = False, note: str = "") -> str:
    """A figure with a line per name; "" when there is nothing to draw. The first line is the boldest."""
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""
    values = [y for points in series.values() for _, y in points]
    ticks = nice_ticks(min([*values, 0.0] if from_zero else values), max(values))
    steps = [x for points in series.values() for x, _ in points]
    scale = Scale(min(steps), max(steps), ticks[0], ticks[-1])
    parts = []
    for index, points in reversed(list(enumerate(series.values()))):
        colour = index % NUM_COLOURS + 1
        if len(points) == 1:
            x, y = points[0]
            parts.append(f'<circle class="f{colour}" cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}" r="3.5"/>')
            continue
        drawn = points
        if len(points) >= SMOOTH_FROM:
            parts.append(f'<path class="line raw s{colour}" d="{scale.path(points)}"/>')
            drawn = smooth(points)
        emphasis = " first" if index == 0 else ""
        parts.append(f'<path class="line s{colour}{emphasis}" d="{scale.path(drawn)}"/>')
    spoken = "; ".join(f"{name} from {p[0][1]:.4g} to {p[-1][1]:.4g}" for name, p in series.items())
    legend = {name: tick_label(float(f"{points[-1][1]:.3g}")) for name, points in series.items()}
    return _figure(title, _axes(scale, ticks) + "".join(parts), spoken, legend, note)


def stacked_chart(title: str, series: Mapping[str, Points], *, note: str = "") -> str:
    """A figure of areas on top of each other; a name without a value at a step counts as 0 there."""
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""
    steps = sorted({x for points in series.values() for x, _ in points})
    tables = {name: dict(points) for name, points in series.items()}
    totals = [sum(table.get(x, 0.0) for table in tables.values()) for x in steps]
    ticks = nice_ticks(0.0, max([*totals, 1e-9]))
    # A single step is widened to a bar, so that there is something to see.
    shown = [steps[0], steps[0] + 1] if len(steps) == 1 else steps
    scale = Scale(shown[0], shown[-1], 0.0, ticks[-1])
    floor = [0.0] * len(shown)
    parts = []
    for index, table in enumerate(tables.values()):
        roof = [low + table.get(steps[min(i, len(steps) - 1)], 0.0) for i, low in enumerate(floor)]
        outline = [*zip(shown, roof, strict=True), *reversed(list(zip(shown, floor, strict=True)))]
        parts.append(f'<path class="area f{index % NUM_COLOURS + 1}" d="{scale.path(outline)}Z"/>')
        floor = roof
    sums = {name: sum(table.values()) for name, table in tables.items()}
    everything = sum(sums.values()) or 1.0
    legend = {name: f"{100 * value / everything:.0f} %" for name, value in sums.items()}
    spoken = "; ".join(f"{name} {share} of the time" for name, share in legend.items())
    return _figure(title, _axes(scale, ticks) + "".join(parts), spoken, legend, note)


def _axes(scale: Scale, ticks: Sequence[float]) -> str:
    parts = []
    for tick in ticks:
        y = scale.y(tick)
        parts.append(f'<path class="grid" d="M{LEFT},{y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick_label(tick)}</text>')
    whole = [tick for tick in nice_ticks(scale.x0, scale.x1, 5) if tick == round(tick)]
    for tick in whole:
        if scale.x0 <= tick <= scale.x1:
            parts.append(f'<text x="{scale.x(tick):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{tick:.0f}</text>')
    return "".join(parts)


def _figure(title: str, drawing: str, spoken: str, legend: Mapping[str, str], note: str) -> str:
    items = "".join(
        f'<li><span class="key b{index % NUM_COLOURS + 1}"></span>{escape(name)} <b>{escape(value)}</b></li>'
        for index, (name, value) in enumerate(legend.items())
    )
    label = escape(f"{title}: {spoken}", quote=True)
    tail = f'<p class="note">{escape(note)}</p>' if note else ""
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{drawing}</svg>'
        f'<ul class="legend">{items}</ul>{tail}</figure>'
    )
