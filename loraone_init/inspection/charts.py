"""Pictures as inline SVG: a heat map, a line chart, a search. Colours are the page's variables, for light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

NUM_COLORS = 8
"""The page defines --c0 to --c7."""

_WIDTH = 720
_LABELS = 120  # for the names of rows, and of the vertical axis' values
_ROW = 22
_HEIGHT = 260
_MARGIN = 16


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


def heat_map(
    rows: Sequence[str], columns: Sequence[str], cells: dict[tuple[int, int], Cell], low: float, high: float
) -> str:
    """Rectangles by (row, column); the fuller the colour the higher the value between `low` and `high`."""
    width = (_WIDTH - _LABELS - _MARGIN) / max(1, len(columns))
    height = _ROW * len(rows)
    parts = []
    for i, row in enumerate(rows):
        parts.append(_text(_LABELS - 6, i * _ROW + _ROW * 0.68, row, "end"))
        for j in range(len(columns)):
            cell = cells.get((i, j))
            box = f'x="{_LABELS + j * width:.1f}" y="{i * _ROW}" width="{width - 1:.1f}" height="{_ROW - 1}" rx="2"'
            if cell is None:
                parts.append(f'<rect {box} class="none"/>')
                continue
            share = (cell.value - low) / (high - low) if high > low else 1.0
            opacity = 0.08 + 0.92 * max(0.0, min(1.0, share))
            parts.append(
                f'<rect {box} class="heat" fill-opacity="{opacity:.3f}"><title>{escape(cell.title)}</title></rect>'
            )
    every = max(1, math.ceil(len(columns) / 16))
    for j in range(0, len(columns), every):
        parts.append(_text(_LABELS + (j + 0.5) * width, height + 14, columns[j], "middle"))
    return _svg(height + 20, parts)


def heat_scale(low: str, high: str) -> str:
    """What pale and full colour mean."""
    return f'<p class="scale"><span>{escape(low)}</span><i></i><span>{escape(high)}</span></p>'


def line_chart(series: Sequence[Series], x_label: str, log: bool = False) -> str:
    """Lines over a common axis, with a legend. log: the vertical axis is logarithmic, and values <= 0 are left out."""
    shown = [Series(line.name, [(x, y) for x, y in line.points if y > 0 or not log]) for line in series]
    shown = [line for line in shown if line.points]
    if not shown:
        return '<p class="quiet">Nothing to draw.</p>'
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
        dash = ' stroke-dasharray="5 3"' if number >= NUM_COLORS else ""
        parts.append(f'<polyline points="{path}" class="line" stroke="{color}"{dash}/>')
        for (x, y), (at_x, value) in zip(points, line.points, strict=True):
            title = escape(f"{line.name}, {at_x:g}: {value:.3g}")
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{color}"><title>{title}</title></circle>')
    return _legend([line.name for line in shown]) + _svg(_HEIGHT, parts)


def search_chart(curve: Sequence[tuple[float, float | None]], before: float, chosen: float) -> str:
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
    parts.append(f'<line x1="{left:.1f}" x2="{_WIDTH - _MARGIN}" y1="{y:.1f}" y2="{y:.1f}" class="before"/>')
    parts.append(_text(_WIDTH - _MARGIN, y - 5, "before the step", "end"))
    places = [
        frame.at(x, min(frame.y1 if loss is None else loss, frame.y1))
        for x, (_, loss) in zip(exponents, curve, strict=True)
    ]
    parts.append(
        f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}" class="line" stroke="var(--c0)"/>'
    )
    for (x, y), (gamma, loss) in zip(places, curve, strict=True):
        told = f"γ = {gamma:g}: {'not finite' if loss is None else f'{loss:.4f}'}"
        fill = "var(--surface)" if loss is None or loss > frame.y1 else "var(--c0)"
        size = 6 if gamma == chosen else 3
        if gamma == chosen:
            anchor = "end" if x > 0.9 * _WIDTH else "middle"
            parts.append(_text(x, y + 20 if y < _HEIGHT - 70 else y - 12, f"γ = {gamma:g}", anchor))
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" fill="{fill}" stroke="var(--c0)">'
            f"<title>{escape(told)}</title></circle>"
        )
    return _svg(_HEIGHT, parts)


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
        return _LABELS / 2 + left * (_WIDTH - _LABELS / 2 - _MARGIN), 8 + top * (_HEIGHT - 44)


def _axes(frame: _Frame, x_ticks: Mapping[float, str], y_ticks: Mapping[float, str], x_label: str) -> list[str]:
    """Lines across at the values of `y_ticks`, and what is written at both axes."""
    parts = []
    for value, text in y_ticks.items():
        _, y = frame.at(frame.x0, value)
        parts.append(f'<line x1="{_LABELS / 2}" x2="{_WIDTH - _MARGIN}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(_text(_LABELS / 2 - 6, y + 4, text, "end"))
    for value, text in x_ticks.items():
        x, _ = frame.at(value, frame.y0)
        is_cut = x + 4 * len(text) > _WIDTH
        parts.append(_text(x, _HEIGHT - 20, text, "end" if is_cut else "middle"))
    parts.append(_text((_WIDTH + _LABELS / 2 - _MARGIN) / 2, _HEIGHT - 3, x_label, "middle"))
    return parts


def _legend(names: Sequence[str]) -> str:
    items = (
        f'<li><i style="background:var(--c{number % NUM_COLORS})"'
        f"{' class=dashed' if number >= NUM_COLORS else ''}></i>{escape(name)}</li>"
        for number, name in enumerate(names)
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _svg(height: float, parts: Sequence[str]) -> str:
    return f'<div class="scroll"><svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img">{"".join(parts)}</svg></div>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


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
    """Whole numbers, at most about 16."""
    step = max(1, math.ceil((high - low) / 16))
    return [float(number) for number in range(math.ceil(low), math.floor(high) + 1, step)]
