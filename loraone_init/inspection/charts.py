"""Pictures as inline SVG: a heat map, a line chart, a search. Colours are the page's variables, for light and dark.

All text goes through `Markup.format`, which escapes it. A picture is drawn 400 units wide, which is about what a phone
has, and the page scales it to the width of its card.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ..adapter.wording import loss_text

NUM_COLORS = 8
"""The page defines --c0 to --c7."""

_WIDTH = 400
_NAMES = 112  # for the names of a heat map's rows
_VALUES = 50  # for the values at the vertical axis of a chart
_LONGEST = 17  # letters of a row's name for which there is room
_ROW = 22
_HEIGHT = 230
_MARGIN = 14
_MOST_LABELS = 10  # along the horizontal axis


@dataclass(frozen=True)
class Series:
    """One line: points (x, y), named in the legend."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Cell:
    """One field of a heat map: its value, and what is told when the pointer is on it."""

    value: float
    title: str


@dataclass(frozen=True)
class Drawing:
    """svg: the picture, None where there is nothing to draw. legend: of its colours. scale: pale and full colour."""

    svg: Markup | None
    legend: Sequence[str] = ()
    scale: tuple[str, str] | None = None


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Mapping[tuple[int, int], Cell],
    between: tuple[float, float],
    scale: tuple[str, str],
) -> Drawing:
    """Rectangles by (row, column); the fuller the colour the higher the value between the two, `scale` in words."""
    low, high = between
    width = (_WIDTH - _NAMES - _MARGIN) / max(1, len(columns))
    height = _ROW * len(rows)
    gap = min(1.0, width / 8)
    parts = []
    for i, row in enumerate(rows):
        name = row if len(row) <= _LONGEST else f"…{row[1 - _LONGEST :]}"
        parts.append(_text(_NAMES - 6, i * _ROW + _ROW * 0.68, name, "end"))
        for j in range(len(columns)):
            box = Markup('x="{:.1f}" y="{}" width="{:.1f}" height="{}" rx="2"').format(
                _NAMES + j * width, i * _ROW, width - gap, _ROW - 1
            )
            cell = cells.get((i, j))
            if cell is None:
                parts.append(Markup('<rect {} class="none"/>').format(box))
                continue
            share = (cell.value - low) / (high - low) if high > low else 1.0
            opacity = 0.08 + 0.92 * max(0.0, min(1.0, share))
            parts.append(
                Markup('<rect {} class="heat" fill-opacity="{:.3f}"><title>{}</title></rect>').format(
                    box, opacity, cell.title
                )
            )
    every = max(1, math.ceil(len(columns) / _MOST_LABELS))
    for j in range(0, len(columns), every):
        parts.append(_text(_NAMES + (j + 0.5) * width, height + 14, columns[j], "middle"))
    return Drawing(_svg(height + 20, parts), scale=scale)


def line_chart(series: Sequence[Series], x_label: str, log: bool = False) -> Drawing:
    """Lines over a common axis, with a legend. log: the vertical axis is logarithmic, and values <= 0 are left out."""
    shown = [Series(line.name, [(x, y) for x, y in line.points if y > 0 or not log]) for line in series]
    shown = [line for line in shown if line.points]
    if not shown:
        return Drawing(None)
    xs = [x for line in shown for x, _ in line.points]
    ys = [math.log10(y) if log else y for line in shown for _, y in line.points]
    ticks = _log_ticks(ys) if log else _ticks(ys)
    frame = _Frame(min(xs), max(xs), min(*ys, *ticks), max(*ys, *ticks))
    parts = _axes(
        frame,
        {x: f"{x:g}" for x in _x_ticks(frame.x0, frame.x1)},
        {y: f"{10**y:.0e}" if log else f"{y:g}" for y in ticks},
        x_label,
    )
    for number, line in enumerate(shown):
        points = [frame.at(x, math.log10(y) if log else y) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        color = f"var(--c{number % NUM_COLORS})"
        dash = "5 3" if number >= NUM_COLORS else "none"
        parts.append(
            Markup('<polyline points="{}" class="line" stroke="{}" stroke-dasharray="{}"/>').format(path, color, dash)
        )
        for (x, y), (at_x, value) in zip(points, line.points, strict=True):
            parts.append(_circle(x, y, 2, color, f"{line.name}, {at_x:g}: {value:.3g}"))
    return Drawing(_svg(_HEIGHT, parts), legend=[line.name for line in shown])


def search_chart(curve: Sequence[tuple[float, float | None]], before: float, chosen: float) -> Drawing:
    """The losses of a search over γ, on a logarithmic axis, with the loss before the step as a line across.

    curve: (γ, loss), ascending; a loss that is not finite, or so large that the others would look alike, is drawn open,
    at the upper edge. chosen: the γ to be marked.
    """
    finite = [loss for _, loss in curve if loss is not None]
    lowest, highest = min(finite, default=before), max(finite, default=before)
    room = max(before - lowest, 0.01 * abs(before))
    limit = min(highest, before + room)
    ticks = _ticks([lowest, before, limit])
    exponents = [math.log2(gamma) for gamma, _ in curve]
    frame = _Frame(min(exponents), max(exponents), min(*ticks, lowest), max(*ticks, limit))
    doublings = {x: f"{2**x:g}" for x in _x_ticks(frame.x0, frame.x1)}
    parts = _axes(frame, doublings, {y: f"{y:g}" for y in ticks}, "γ")
    left, y = frame.at(frame.x0, before)
    parts.append(_line_across(left, y, "before"))
    parts.append(_text(_WIDTH - _MARGIN, y - 5, "before the step", "end"))
    places = [
        frame.at(x, min(frame.y1 if loss is None else loss, frame.y1))
        for x, (_, loss) in zip(exponents, curve, strict=True)
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts.append(Markup('<polyline points="{}" class="line" stroke="var(--c0)"/>').format(path))
    for (x, y), (gamma, loss) in zip(places, curve, strict=True):
        fill = "var(--surface)" if loss is None or loss > frame.y1 else "var(--c0)"
        if gamma == chosen:
            anchor = "end" if x > 0.85 * _WIDTH else "start" if x < 0.25 * _WIDTH else "middle"
            parts.append(_text(x, y + 20 if y < _HEIGHT - 70 else y - 12, f"γ = {gamma:g}", anchor))
        parts.append(_circle(x, y, 6 if gamma == chosen else 3, fill, f"γ = {gamma:g}: {loss_text(loss)}"))
    return Drawing(_svg(_HEIGHT, parts))


@dataclass(frozen=True)
class _Frame:
    """The values at the edges of a chart."""

    x0: float
    x1: float
    y0: float
    y1: float

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where the point is in the picture."""
        left = (x - self.x0) / (self.x1 - self.x0) if self.x1 > self.x0 else 0.5
        top = (self.y1 - y) / (self.y1 - self.y0) if self.y1 > self.y0 else 0.5
        return _VALUES + left * (_WIDTH - _VALUES - _MARGIN), 8 + top * (_HEIGHT - 44)


def _axes(frame: _Frame, x_ticks: Mapping[float, str], y_ticks: Mapping[float, str], x_label: str) -> list[Markup]:
    """Lines across at the values of `y_ticks`, and what is written at both axes."""
    parts = []
    for value, text in y_ticks.items():
        _, y = frame.at(frame.x0, value)
        parts.append(_line_across(_VALUES, y, "grid"))
        parts.append(_text(_VALUES - 6, y + 4, text, "end"))
    for value, text in x_ticks.items():
        x, _ = frame.at(value, frame.y0)
        is_cut = x + 3.5 * len(text) > _WIDTH
        parts.append(_text(x, _HEIGHT - 20, text, "end" if is_cut else "middle"))
    parts.append(_text((_WIDTH + _VALUES - _MARGIN) / 2, _HEIGHT - 3, x_label, "middle"))
    return parts


def _svg(height: float, parts: Sequence[Markup]) -> Markup:
    content = Markup("").join(parts)
    return Markup('<svg viewBox="0 0 {} {:.0f}" role="img">{}</svg>').format(_WIDTH, height, content)


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


def _circle(x: float, y: float, radius: float, fill: str, title: str) -> Markup:
    """A point, with what is told when the pointer is on it."""
    edge = "var(--c0)" if fill == "var(--surface)" else fill
    return Markup(
        '<circle cx="{:.1f}" cy="{:.1f}" r="{}" fill="{}" stroke="{}" stroke-width="1"><title>{}</title></circle>'
    ).format(x, y, radius, fill, edge, title)


def _line_across(left: float, y: float, style: str) -> Markup:
    """From `left` to the right edge."""
    return Markup('<line x1="{:.1f}" x2="{}" y1="{:.1f}" y2="{:.1f}" class="{}"/>').format(
        left, _WIDTH - _MARGIN, y, y, style
    )


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers, four to eight of them, that enclose the values."""
    low, high = min(values), max(values)
    span = high - low or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (factor * step) <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _log_ticks(exponents: Sequence[float]) -> list[float]:
    """Powers of ten that enclose 10^exponents, at most about eight."""
    first, last = math.floor(min(exponents)), math.ceil(max(exponents))
    step = max(1, math.ceil((last - first) / 8))
    return [float(exponent) for exponent in range(first, last + step, step)]


def _x_ticks(low: float, high: float) -> list[float]:
    """Whole numbers, at most about ten."""
    step = max(1, math.ceil((high - low) / _MOST_LABELS))
    return [float(number) for number in range(math.ceil(low), math.floor(high) + 1, step)]
