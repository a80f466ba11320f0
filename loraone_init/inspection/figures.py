"""The page's figures: what of an adapter's layers is drawn, and in which of the charts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from ..adapter.records import GrowthReport, LossReport
from .charts import Cell, Drawing, Series, heat_map, line_chart, search_chart
from .facts import LayerFacts, by_depth, by_kind
from .layer_names import short_kinds


@dataclass(frozen=True)
class Figure:
    """A drawing with its caption."""

    title: str
    text: str
    drawing: Drawing


def by_stack(facts: Sequence[LayerFacts]) -> dict[str, list[LayerFacts]]:
    """The layers by the list of blocks that they are in."""
    stacks: dict[str, list[LayerFacts]] = {}
    for fact in facts:
        stacks.setdefault(fact.place.stack, []).append(fact)
    return stacks


def figures_of_stack(facts: list[LayerFacts]) -> list[Figure]:
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
    return [
        *([Figure("Rank", "What the budget gave each layer", _rank_map(facts))] if len(set(ranks)) > 1 else []),
        Figure("Captured energy", "Share of ‖G‖² in the rank-r adapter, by depth and layer type", _energy_map(facts)),
        Figure("Gradient norm", "‖G‖ by depth", line_chart(norms, "block", log=True)),
        Figure("Singular spectra", "σᵢ/σ₁ of G, median over depth", line_chart(spectra, "i", log=True)),
        Figure(
            "Energy against rank",
            "Share of ‖G‖² captured by rank r, median of layers that have it",
            line_chart(energies, "r"),
        ),
    ]


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


def _rank_map(facts: list[LayerFacts]) -> Drawing:
    ranks = {fact.name: float(len(fact.report.singular_values)) for fact in facts}
    most = max(ranks.values())
    return _depth_map(facts, ranks, (0.0, most), ("0", f"{most:g}"), "rank {:g}")


def _energy_map(facts: list[LayerFacts]) -> Drawing:
    energies = {fact.name: fact.report.captured_energy for fact in facts}
    low = math.floor(10 * min(energies.values())) / 10
    return _depth_map(facts, energies, (low, 1.0), (f"{low:.0%}", "100%"), "{:.1%} captured")


def _depth_map(
    facts: Sequence[LayerFacts],
    values: Mapping[str, float],
    between: tuple[float, float],
    scale: tuple[str, str],
    told: str,
) -> Drawing:
    """A heat map over layer type × depth of values by layer name; of a block's experts, the least.

    between: the values of pale and full colour. scale: the same in words. told: the format of a value.
    """
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
    return heat_map([names[kind] for kind in kinds], [str(depth) for depth in depths], cells, between, scale)


def search_figure(loss: LossReport, gamma: float) -> Figure:
    """The losses for all γ that were tried, the one without a step, and the γ that was taken."""
    rows = f"{loss.rows} rows that the gradient is {'not ' * loss.held_out}from"
    text = f"Mean on {rows}; the larger γ, the shorter the step (open: higher up)"
    title = "Held-out loss against γ" if loss.held_out else "Loss against γ"
    return Figure(title, text, search_chart(loss.curve, loss.before, gamma))


def growth_figure(growth: GrowthReport) -> Figure:
    """How the halves of the sample agreed while it grew."""
    stages = [stage for stage in growth.stages if stage.agreement_median is not None]
    lines = {
        "halves agree, median": [(stage.samples, stage.agreement_median or 0.0) for stage in stages],
        "halves agree, least": [(stage.samples, stage.agreement_min or 0.0) for stage in stages],
        "captured energy, median": [(stage.samples, stage.captured_energy or 0.0) for stage in stages],
    }
    drawn = line_chart([Series(name, points) for name, points in lines.items()], "samples")
    return Figure("Sample size", "Mean cos² between the halves' rank-r subspaces, over layers", drawn)


def agreement_figures(facts: Sequence[LayerFacts], cosines: Mapping[str, float]) -> list[Figure]:
    """The cosine of two adapters' updates, by layer name, for each list of blocks."""
    return [
        Figure(
            "Agreement",
            f"Cosine of the two updates in {stack or 'other layers'}",
            _depth_map(group, cosines, (0.0, 1.0), ("0", "1"), "cosine {:.3f}"),
        )
        for stack, group in by_stack([fact for fact in facts if fact.name in cosines]).items()
    ]
