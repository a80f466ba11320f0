"""One self-contained page about an adapter: pictures first, then where it comes from, then every layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from importlib.resources import files
from statistics import median
from typing import Any

from ..adapter.adapter import Adapter
from ..adapter.records import GrowthReport
from ..adapter.wording import describe_growth, describe_ranks
from .charts import Cell, Series, heat_map, heat_scale, line_chart, search_chart
from .comparison import Comparison
from .facts import Anomaly, LayerFacts, by_depth, by_kind
from .layer_names import short_kinds

MAX_ANOMALIES = 20


def render_page(
    adapter: Adapter,
    facts: Sequence[LayerFacts],
    anomalies: Sequence[Anomaly],
    comparison: Comparison | None = None,
    other_name: str = "",
) -> str:
    """The page as text. It loads nothing from anywhere."""
    style = files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    title = f"LoRA-One adapter of {adapter.base.get('name') or 'a model'}"
    sections = [
        f"<h1>{escape(title)}</h1>",
        _tiles(adapter, facts),
        _anomalies(anomalies),
        *(_of_stack(stack, layers) for stack, layers in _stacks(facts).items()),
        _losses(adapter),
        _growth(adapter.growth) if adapter.growth else "",
        _comparison(facts, comparison, other_name) if comparison else "",
        _provenance(adapter),
        _layers(facts),
        '<footer>LoRA-One: Zhang, Liu, Chen, ICML 2025, <a href="https://arxiv.org/abs/2502.01235">arXiv 2502.01235</a>'
        "</footer>",
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main>{''.join(sections)}</main></body></html>"
        "\n"
    )


def _tiles(adapter: Adapter, facts: Sequence[LayerFacts]) -> str:
    after = "not finite" if adapter.loss.after is None else f"{adapter.loss.after:.4f}"
    sines = [fact.report.sine for fact in facts if fact.report.sine is not None]
    tiles = {
        "loss before → after the step": f"{adapter.loss.before:.4f} → {after}",
        "captured energy, median": f"{median(fact.report.captured_energy for fact in facts):.1%}",
        "worst sin∠ of the SVD": f"{max(sines):.1e}" if sines else "no gaps",
        "rank, γ": f"{describe_ranks([*adapter.ranks.values()])}, {adapter.config.gamma:g}",
        "layers, parameters": f"{len(facts)}, {adapter.num_parameters:,}",
    }
    items = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in tiles.items())
    return f'<dl class="tiles">{items}</dl>'


def _anomalies(anomalies: Sequence[Anomaly]) -> str:
    if not anomalies:
        return '<section><h2>Out of the ordinary</h2><p class="quiet">Nothing.</p></section>'
    items = "".join(
        f"<li><code>{escape(anomaly.layer)}</code> {escape(anomaly.text)}</li>" for anomaly in anomalies[:MAX_ANOMALIES]
    )
    more = len(anomalies) - MAX_ANOMALIES
    rest = f'<p class="quiet">and {more} more, in the terminal</p>' if more > 0 else ""
    return f'<section><h2>Out of the ordinary</h2><ul class="odd">{items}</ul>{rest}</section>'


def _stacks(facts: Sequence[LayerFacts]) -> dict[str, list[LayerFacts]]:
    stacks: dict[str, list[LayerFacts]] = {}
    for fact in facts:
        stacks.setdefault(fact.place.stack, []).append(fact)
    return stacks


def _of_stack(stack: str, facts: list[LayerFacts]) -> str:
    """The pictures of one list of blocks."""
    kinds = {kind: layers for (_, kind), layers in by_kind(facts).items()}
    names = short_kinds(list(kinds))
    ranks = [len(fact.report.singular_values) for fact in facts]
    rank = max(ranks)
    spectra = [
        Series(names[kind], [(i + 1, _median_ratio(layers, i)) for i in range(rank)]) for kind, layers in kinds.items()
    ]
    energies = [Series(names[kind], _median_energies(layers, rank)) for kind, layers in kinds.items()]
    norms = [
        Series(
            names[kind],
            [
                (depth, median(fact.report.gradient_norm for fact in layers))
                for (_, depth), layers in by_depth(of_kind).items()
            ],
        )
        for kind, of_kind in kinds.items()
    ]
    heading = escape(stack or "outside of the blocks")
    figures = [
        *([_figure("Rank", "What the budget gave each layer", _rank_map(facts))] if len(set(ranks)) > 1 else []),
        _figure("Captured energy", "Share of ‖G‖² in the rank-r adapter, by depth and layer type", _energy_map(facts)),
        _figure("Gradient norm", "‖G‖ by depth", line_chart(norms, "block", log=True)),
        _figure("Singular spectra", "σᵢ/σ₁ of G, median over depth", line_chart(spectra, "i", log=True)),
        _figure(
            "Energy against rank",
            "Share of ‖G‖² captured by rank r, median of layers that have it",
            line_chart(energies, "r"),
        ),
    ]
    return f"<section><h2><code>{heading}</code></h2>{''.join(figures)}</section>"


def _median_ratio(layers: Sequence[LayerFacts], index: int) -> float:
    """Of σ_{index+1}/σ_1; 0 where fewer than half of the layers have that many, and the median would be of others."""
    values = [v for fact in layers if len(v := fact.report.singular_values) > index]
    ratios = [v[index] / v[0] for v in values if v[0] > 0]
    return median(ratios) if ratios and 2 * len(values) >= len(layers) else 0.0


def _median_energies(layers: Sequence[LayerFacts], most: int) -> list[tuple[float, float]]:
    """(r, median of the energies at rank r over the layers that have this rank), as long as half of them do."""
    points = []
    for rank in range(1, most + 1):
        energies = [fact.energy_at(rank) for fact in layers if len(fact.report.singular_values) >= rank]
        if 2 * len(energies) >= len(layers):
            points.append((float(rank), median(energies)))
    return points


def _rank_map(facts: list[LayerFacts]) -> str:
    ranks = {fact.name: float(len(fact.report.singular_values)) for fact in facts}
    most = max(ranks.values())
    return heat_scale("0", f"{most:g}") + _depth_map(facts, ranks, 0.0, most, "rank {:g}")


def _energy_map(facts: list[LayerFacts]) -> str:
    energies = {fact.name: fact.report.captured_energy for fact in facts}
    low = math.floor(10 * min(energies.values())) / 10
    drawn = _depth_map(facts, energies, low, 1.0, "{:.1%} captured")
    return heat_scale(f"{low:.0%}", "100%") + drawn


def _depth_map(facts: Sequence[LayerFacts], values: Mapping[str, float], low: float, high: float, told: str) -> str:
    """A heat map over layer type × depth of values by layer name; of a block's experts, the least."""
    shown = [fact for fact in facts if fact.name in values]
    kinds = list(dict.fromkeys(fact.place.kind for fact in shown))
    depths = sorted({fact.place.depth for fact in shown if fact.place.depth is not None}) or [0]
    cells: dict[tuple[int, int], Cell] = {}
    for fact in shown:
        place = kinds.index(fact.place.kind), depths.index(fact.place.depth or depths[0])
        value = values[fact.name]
        if place not in cells or value < cells[place].value:
            cells[place] = Cell(value, f"{fact.name}: {told.format(value)}")
    names = short_kinds(kinds)
    return heat_map([names[kind] for kind in kinds], [str(depth) for depth in depths], cells, low, high)


def _losses(adapter: Adapter) -> str:
    """Bars of the losses before and after the step, and after training."""
    loss, training = adapter.loss, adapter.training or {}
    rows = f"{loss.rows} rows{' held out' * loss.held_out}"
    values = {f"before the step, {rows}": loss.before, f"after the step, {rows}": loss.after}
    values |= {
        name: training[key]
        for name, key in (("first of the training", "first_loss"), ("last of the training", "last_loss"))
        if training.get(key) is not None
    }
    top = max(value for value in values.values() if value is not None)
    bars = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="bar"><i style="width:{100 * (value or 0) / top:.1f}%"></i>'
        f"</td><td>{'not finite' if value is None else f'{value:.4f}'}</td></tr>"
        for name, value in values.items()
    )
    return f'<section><h2>Loss</h2><table class="bars">{bars}</table>{_search(adapter)}</section>'


def _search(adapter: Adapter) -> str:
    """The losses for all γ that were tried, where it was searched for."""
    loss = adapter.loss
    if not loss.curve:
        return ""
    text = (
        f"Mean on {loss.rows} rows that the gradient is not from; the larger γ, the shorter the step (open: higher up)"
    )
    return _figure("Held-out loss against γ", text, search_chart(loss.curve, loss.before, adapter.gamma))


def _growth(growth: GrowthReport) -> str:
    stages = [stage for stage in growth.stages if stage.agreement_median is not None]
    lines = {
        "halves agree, median": [(stage.samples, stage.agreement_median or 0.0) for stage in stages],
        "halves agree, least": [(stage.samples, stage.agreement_min or 0.0) for stage in stages],
        "captured energy, median": [(stage.samples, stage.captured_energy or 0.0) for stage in stages],
    }
    drawn = line_chart([Series(name, points) for name, points in lines.items()], "samples")
    figure = _figure("Sample size", "Mean cos² between the halves' rank-r subspaces, over layers", drawn)
    return f"<section><h2>Sample</h2><p>{escape(describe_growth(asdict(growth)))}.</p>{figure}</section>"


def _comparison(facts: Sequence[LayerFacts], comparison: Comparison, other_name: str) -> str:
    layers = comparison.layers
    largest = [max(both.output_angles + both.input_angles) for both in layers.values()]
    cosines = {name: both.cosine for name, both in layers.items()}
    maps = "".join(
        _figure("Agreement", f"Cosine of the two updates in {stack or 'other layers'}", _agreement(group, cosines))
        for stack, group in _stacks([fact for fact in facts if fact.name in cosines]).items()
    )
    rows = [
        [
            name,
            f"{max(both.output_angles):.1f}°",
            f"{max(both.input_angles):.1f}°",
            f"{both.cosine:.3f}",
            "–" if both.ratio is None else f"{both.ratio:.3g}",
        ]
        for name, both in layers.items()
    ]
    missing = [
        f"<p>Only in {escape(where)}: {len(names)} layers, such as <code>{escape(names[0])}</code></p>"
        for where, names in (("this adapter", comparison.only_first), (other_name, comparison.only_second))
        if names
    ]
    head = ["layer", "largest angle, outputs", "largest angle, inputs", "cosine of ΔW", "‖ΔW‖ ratio"]
    return (
        f"<section><h2>Compared with <code>{escape(other_name)}</code></h2>"
        f"<p>Median over layers: largest principal angle {median(largest):.1f}°, cosine of the updates"
        f" {median(cosines.values()):.3f}.</p>{''.join(missing)}{maps}"
        f"<details><summary>All layers</summary>{_table(head, rows)}</details></section>"
    )


def _agreement(facts: Sequence[LayerFacts], cosines: Mapping[str, float]) -> str:
    return heat_scale("0", "1") + _depth_map(facts, cosines, 0.0, 1.0, "cosine {:.3f}")


def _provenance(adapter: Adapter) -> str:
    record: dict[str, Any] = {
        **{f"base {key}": value for key, value in adapter.base.items()},
        **{f"data {key.replace('_', ' ')}": value for key, value in adapter.sample.items() if key != "options"},
        "α, scaling": f"{adapter.config.alpha:g}, {adapter.config.scaling}, s = {adapter.config.scale:.4g}",
        "target modules": adapter.config.target_modules,
        "seed": adapter.config.seed,
        "preconditioner": f"{adapter.preconditioner.kind}, damping {adapter.preconditioner.damping:g}",
        **{f"training {key.replace('_', ' ')}": value for key, value in (adapter.training or {}).items()},
    }
    rows = [[key, str(value)] for key, value in record.items() if value is not None]
    return f"<section><h2>Where it comes from</h2>{_table(None, rows, 'facts')}</section>"


def _layers(facts: Sequence[LayerFacts]) -> str:
    in_halves = any(fact.report.agreement for fact in facts)
    head = ["layer", "out × in", "rank", "start", "‖G‖", "σ₁", "σ_r/σ₁", "captured", "sin∠", "‖ΔW‖"]
    head += ["halves agree"] if in_halves else []
    rows = []
    for fact in facts:
        report = fact.report
        top, last = report.singular_values[0], report.singular_values[-1]
        rows.append(
            [
                fact.name,
                "{} × {}".format(*report.shape),
                str(len(report.singular_values)),
                report.init,
                f"{report.gradient_norm:.2e}",
                f"{top:.2e}",
                f"{last / top:.3f}" if top else "–",
                f"{report.captured_energy:.1%}",
                "no gap" if report.sine is None else f"{report.sine:.0e}",
                f"{fact.step_norm:.3g}",
                *([f"{min(report.agreement):.2f}" if report.agreement else "–"] if in_halves else []),
            ]
        )
    count = len(by_depth(list(facts)))
    return (
        f"<section><h2>Layers</h2><details><summary>All {len(rows)}, of {count} blocks</summary>"
        f"{_table(head, rows)}</details></section>"
    )


def _figure(title: str, text: str, drawing: str) -> str:
    return f"<figure><figcaption><b>{escape(title)}</b> {escape(text)}</figcaption>{drawing}</figure>"


def _table(head: Sequence[str] | None, rows: Sequence[Sequence[str]], style: str = "") -> str:
    top = "" if head is None else f"<thead><tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr></thead>"
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return f'<div class="scroll"><table class="{style}">{top}<tbody>{body}</tbody></table></div>'
