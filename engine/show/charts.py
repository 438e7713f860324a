"""Line and stacked-area charts as inline SVG: axes with names and units, values on hover, colours from the page's CSS.

Hovering works without a script: columns over the drawing hold the values of their steps as titles, which browsers show;
the page's script, where it may run, shows them at once below the chart, also for a finger and for the arrow keys.
Every chart has a text alternative that says where each line starts and ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import NamedTuple

Points = Sequence[tuple[float, float]]
"""(step, value), steps rising."""

WIDTH, HEIGHT = 480, 260
LEFT, RIGHT, TOP, BOTTOM = 60, 14, 30, 44
NUM_COLOURS = 6
SMOOTH_FROM = 24
"""Lines with at least this many points are drawn smoothed, over a faint line of what was measured."""
MAX_DRAWN = 240
"""Points of a line; the drawing is 400 pixels wide."""
MAX_COLUMNS = 60
"""That hold values: a finger hits no narrower ones."""


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


def smoothing_window(count: int) -> int:
    """Steps that a smoothed point is the mean of: about a tenth of all."""
    return 2 * max(1, count // 20) + 1


def smooth(points: Points) -> list[tuple[float, float]]:
    """Mean over a centred window of about a tenth of the points, so that a rise is not shown late."""
    half = smoothing_window(len(points)) // 2
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    smoothed = []
    for i, (x, _) in enumerate(points):
        first, last = max(0, i - half), min(len(points), i + half + 1)
        smoothed.append((x, (sums[last] - sums[first]) / (last - first)))
    return smoothed


def thinned(points: Points, most: int = MAX_DRAWN) -> list[tuple[float, float]]:
    """At most so many points: of each stretch the lowest and the highest one, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    kept: list[tuple[float, float]] = []
    for stretch in _stretches(points, most // 2):
        lowest, highest = min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])
        kept += sorted({lowest, highest})
    return kept


def _stretches(points: Points, count: int) -> Iterator[Points]:
    """`points` in so many neighbouring parts of nearly equal length, none of them empty."""
    count = min(count, len(points))
    for i in range(count):
        yield points[i * len(points) // count : (i + 1) * len(points) // count]


def line_chart(
    title: str, series: Mapping[str, Points], *, unit: str = "", from_zero: bool = False, note: str = ""
) -> str:
    """A figure with a line per name; "" when there is nothing to draw. The first line is the boldest.

    Args:
        title: what is shown.
        series: name -> points.
        unit: of the values, written at the axis.
        from_zero: the axis begins at 0.
        note: a sentence below.
    """
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""
    values = [y for points in series.values() for _, y in points]
    low, high = min([*values, 0.0] if from_zero else values), max(values)
    ticks = nice_ticks(low, high if high > low or not from_zero else 1.0)
    steps = [x for points in series.values() for x, _ in points]
    scale = Scale(min(steps), max(steps), ticks[0], ticks[-1])
    parts: list[str] = []
    windows: set[int] = set()
    for index, points in reversed(list(enumerate(series.values()))):
        colour = index % NUM_COLOURS + 1
        if len(points) == 1:
            x, y = points[0]
            parts.append(f'<circle class="f{colour}" cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}" r="3.5"/>')
            continue
        drawn = points
        if len(points) >= SMOOTH_FROM:
            parts.append(f'<path class="line raw s{colour}" d="{scale.path(thinned(points))}"/>')
            drawn, windows = smooth(points), windows | {smoothing_window(len(points))}
        emphasis = " first" if index == 0 else ""
        parts.append(f'<path class="line s{colour}{emphasis}" d="{scale.path(thinned(drawn))}"/>')
    if windows:
        note = f"{note} Thick: mean of the {max(windows)} steps around; thin: every step.".strip()
    ends = {name: (points[0][1], points[-1][1]) for name, points in series.items()}
    spoken = "; ".join(f"{name} from {first:.4g} to {last:.4g}" for name, (first, last) in ends.items())
    legend = {name: _first_to_last([y for _, y in points]) for name, points in series.items()}
    drawing = _axes(scale, ticks, unit) + "".join(parts) + _columns(scale, series, unit)
    return _figure(title, drawing, spoken, legend, note)


def _first_to_last(values: Sequence[float]) -> str:
    """Means of the first and the last tenth."""
    count = max(1, len(values) // 10)
    first, last = sum(values[:count]) / count, sum(values[-count:]) / count
    return _short(last) if len(values) == 1 else f"{_short(first)} → {_short(last)}"


def _short(value: float) -> str:
    return tick_label(float(f"{value:.3g}"))


def stacked_chart(title: str, series: Mapping[str, Points], *, unit: str = "", note: str = "") -> str:
    """A figure of areas on top of each other; a name without a value at a step counts as 0 there."""
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""
    steps = sorted({x for points in series.values() for x, _ in points})
    tables = {name: dict(points) for name, points in series.items()}
    totals = [sum(table.get(x, 0.0) for table in tables.values()) for x in steps]
    ticks = nice_ticks(0.0, max([*totals, 1e-9]))
    # A single step is widened to a bar, so that there is something to see.
    stretches = [[x] for x in steps] if len(steps) > 1 else [steps, steps]
    if len(steps) > MAX_DRAWN:
        stretches = [[x for x, _ in stretch] for stretch in _stretches([(x, 0.0) for x in steps], MAX_DRAWN)]
    shown = [stretch[0] for stretch in stretches] if len(steps) > 1 else [steps[0], steps[0] + 1]
    scale = Scale(shown[0], shown[-1], 0.0, ticks[-1])
    floor = [0.0] * len(shown)
    parts = []
    for index, table in enumerate(tables.values()):
        heights = [sum(table.get(x, 0.0) for x in stretch) / len(stretch) for stretch in stretches]
        roof = [low + height for low, height in zip(floor, heights, strict=True)]
        outline = [*zip(shown, roof, strict=True), *reversed(list(zip(shown, floor, strict=True)))]
        parts.append(f'<path class="area f{index % NUM_COLOURS + 1}" d="{scale.path(outline)}Z"/>')
        floor = roof
    sums = {name: sum(table.values()) for name, table in tables.items()}
    everything = sum(sums.values()) or 1.0
    legend = {name: f"{100 * value / everything:.0f} %" for name, value in sums.items()}
    spoken = "; ".join(f"{name} {share} of all" for name, share in legend.items())
    drawing = _axes(scale, ticks, unit) + "".join(parts) + _columns(scale, series, unit)
    return _figure(title, drawing, spoken, legend, note)


def _axes(scale: Scale, ticks: Sequence[float], unit: str) -> str:
    parts = []
    for tick in ticks:
        y = scale.y(tick)
        parts.append(f'<path class="grid" d="M{LEFT},{y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick_label(tick)}</text>')
    whole = [tick for tick in nice_ticks(scale.x0, scale.x1, 5) if tick == round(tick)]
    for tick in whole:
        if scale.x0 <= tick <= scale.x1:
            x = f"{scale.x(tick):.1f}"
            parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:.0f}</text>')
    parts.append(f'<text class="axis" x="{LEFT}" y="{TOP - 12}">{escape(unit)}</text>')
    parts.append(f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">step</text>')
    return "".join(parts)


def _columns(scale: Scale, series: Mapping[str, Points], unit: str) -> str:
    """Invisible columns side by side, each with the values of its steps: what a pointer over it shows."""
    steps = sorted({x for points in series.values() for x, _ in points})
    tables = {name: dict(points) for name, points in series.items()}
    stretches = [[x for x, _ in part] for part in _stretches([(x, 0.0) for x in steps], MAX_COLUMNS)]
    middles = [scale.x((stretch[0] + stretch[-1]) / 2) for stretch in stretches]
    parts = []
    for index, stretch in enumerate(stretches):
        left = LEFT if index == 0 else (middles[index - 1] + middles[index]) / 2
        right = WIDTH - RIGHT if index == len(stretches) - 1 else (middles[index] + middles[index + 1]) / 2
        said = _values(stretch, tables)
        parts.append(
            f'<g class="at"><title>{escape(said)}{escape(f" ({unit})" if unit else "")}</title>'
            f'<rect x="{left:.1f}" y="{TOP}" width="{max(0.0, right - left):.1f}" height="{HEIGHT - TOP - BOTTOM}"/>'
            f'<path d="M{middles[index]:.1f},{TOP}V{HEIGHT - BOTTOM}"/></g>'
        )
    return "".join(parts)


def _values(stretch: Sequence[float], tables: Mapping[str, Mapping[float, float]]) -> str:
    """`step 12: total 0.61, text 0.7`; of several steps their means."""
    place = f"step {stretch[0]:.0f}" if len(stretch) == 1 else f"steps {stretch[0]:.0f} to {stretch[-1]:.0f}, mean"
    said = []
    for name, table in tables.items():
        there = [table[x] for x in stretch if x in table]
        said.append(f"{name} {_short(sum(there) / len(there)) if there else '–'}")
    return f"{place}: {', '.join(said)}"


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
        f'<p class="readout" aria-hidden="true"></p><ul class="legend">{items}</ul>{tail}</figure>'
    )
