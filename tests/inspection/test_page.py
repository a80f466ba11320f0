"""The page: hostile names stay text wherever they are shown, and pictures keep within their width."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from loraone_init import Adapter
from loraone_init.adapter.records import GrowthReport, GrowthStage
from loraone_init.inspection.charts import Cell, Series, heat_map, line_chart, search_chart
from loraone_init.inspection.comparison import compare_adapters
from loraone_init.inspection.facts import Anomaly, layer_facts
from loraone_init.inspection.page import render_page

HOSTILE = (
    '</style></title></svg><script>alert(1)</script><img src=x onerror=\'alert(2)\'>" onload="alert(3)" {{ 7 * 191 }}'
)
TAGS = (
    "html head meta title style body main h1 h2 dl div dt dd section p ul li code figure figcaption b span i svg rect"
    " text line polyline circle table thead tbody tr th td details summary footer a"
)
ATTRIBUTES = (
    "lang charset name content class style scope href role viewbox x y x1 x2 y1 y2 cx cy r rx width height points fill"
    " fill-opacity stroke stroke-width stroke-dasharray text-anchor"
)


class Seen(HTMLParser):
    """All tags, attributes and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: dict[str, set[str]] = {}
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, set()).add(value or "")

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def adapter(initialised: Path) -> Adapter:
    return Adapter.load(initialised)


def renamed(adapter: Adapter, what: str) -> Adapter:
    """With `what` in place of the list of blocks and at the end of each layer's name."""
    names = {name: f"{name.replace('model.layers', what)}{what}" for name in adapter.layers}
    return replace(
        adapter,
        layers={names[name]: report for name, report in adapter.layers.items()},
        pairs={names[name]: pair for name, pair in adapter.pairs.items()},
    )


def hostile_page(adapter: Adapter, what: str) -> str:
    stages = tuple(GrowthStage(samples, 0.5, 0.25, 0.75, 0) for samples in (8, 16))
    changed = replace(
        renamed(adapter, what),
        base={what: what, "name": what},
        sample={what: what, "source": what},
        training={what: what, "first_loss": 2.0, "last_loss": 1.0},
        loss=replace(adapter.loss, curve=((1.0, 1.5), (2.0, None), (4.0, 1.25))),
        growth=GrowthReport(0.1, 16, True, stages),
    )
    facts = layer_facts(changed)
    comparison = compare_adapters(changed, changed)
    comparison = replace(comparison, only_first=(what,), only_second=(what,))
    anomalies = [Anomaly(what, what)] * 25
    return render_page(changed, facts, anomalies, comparison, what)


def test_hostile_names_are_text_only(adapter: Adapter) -> None:
    page = hostile_page(adapter, HOSTILE)
    seen = Seen(page)
    assert seen.tags == set(TAGS.split())
    assert set(seen.attributes) <= set(ATTRIBUTES.split())
    assert not any("alert" in value for values in seen.attributes.values() for value in values)
    assert "1337" not in page
    text = "".join(seen.text)
    for place in ("LoRA-One adapter of ", "Compared with ", "Only in ", "Cosine of the two updates in ", "data source"):
        assert f"{place}{HOSTILE}" in text


def test_names_change_nothing_but_text(adapter: Adapter) -> None:
    """Tags and attributes are those of the page with harmless names."""
    tags = [re.findall(r"<[^>]*>", hostile_page(adapter, what)) for what in ("harmless", "<b>&'\"")]
    assert tags[0] == tags[1]


def test_names_of_the_charts_are_escaped() -> None:
    line = line_chart([Series("<b>", [(0, 1), (1, 2)])], "<i>")
    cells = {(0, 0): Cell(0.5, "<b>")}
    heat = heat_map(["<b>"], ["<i>"], cells, (0, 1), ("0", "1"))
    for drawing in (line, heat):
        assert drawing.svg is not None
        assert "<b>" not in drawing.svg
        assert "&lt;b&gt;" in drawing.svg
        assert "&lt;i&gt;" in drawing.svg


def test_long_name_of_a_row_keeps_its_end() -> None:
    name = "layer.1.EncDecAttention.relative_attention_bias"
    drawing = heat_map([name, "q"], ["0"], {(0, 0): Cell(1, name)}, (0, 1), ("0", "1"))
    assert drawing.svg is not None
    assert ">…e_attention_bias<" in drawing.svg
    assert f"<title>{name}</title>" in drawing.svg
    assert ">q<" in drawing.svg


@pytest.mark.parametrize("columns", [1, 30, 200])
def test_heat_map_keeps_within_its_width(columns: int) -> None:
    cells = {(0, column): Cell(0.5, "") for column in range(columns)}
    svg = heat_map(["q"], [str(column) for column in range(columns)], cells, (0, 1), ("0", "1")).svg
    boxes = [(float(x), float(w)) for x, w in re.findall(r'<rect x="([\d.]+)" y="0" width="([\d.]+)"', str(svg))]
    assert len(boxes) == columns
    assert all(width > 0 for _, width in boxes)
    assert max(x + width for x, width in boxes) <= 400
    assert len(re.findall("<text", str(svg))) <= 1 + 10


def test_nothing_to_draw_is_said(adapter: Adapter) -> None:
    assert line_chart([Series("zero", [(0, 0.0)])], "i", log=True).svg is None
    zero = {name: replace(report, gradient_norm=0.0) for name, report in adapter.layers.items()}
    changed = replace(adapter, layers=zero)
    assert "Nothing to draw." in render_page(changed, layer_facts(changed), [])


def test_loss_that_is_not_finite_is_drawn_open() -> None:
    svg = str(search_chart(((1.0, None), (2.0, 1.5)), 2.0, 2.0).svg)
    assert 'fill="var(--surface)"' in svg
    assert "γ = 1: not finite" in svg
    assert "γ = 2: 1.5000" in svg
