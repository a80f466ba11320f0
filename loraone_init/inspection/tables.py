"""What `loraone-inspect` prints: anomalies first, then groups of layers by type and by depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import TypeVar

from rich.console import Console
from rich.text import Text

from ..adapter.adapter import Adapter
from ..adapter.records import LayerReport
from ..adapter.wording import count, describe_growth, describe_ranks, describe_search, loss_text, warning_of
from ..errors import printable
from ..terminal import print_facts, print_figures
from .comparison import Comparison, LayerComparison
from .facts import Anomaly, LayerFacts
from .layer_names import Place, place_of

_Item = TypeVar("_Item")

MAX_ANOMALIES = 12
_NORM, _CAPTURED = "‖G‖", ("captured\nmin", "\nmedian", "sin∠\nmax", "‖ΔW‖")
_ANGLES = ("∠ out\nmax", "∠ in\nmax", "∠ out\nmean", "∠ in\nmean", "cos ΔW", "‖ΔW‖\nratio")

Groups = dict[str, dict[str, list[_Item]]]
"""What a table has a line for: by the stack of blocks that is printed once, and by the rest of the name."""


def print_adapter(
    adapter: Adapter, facts: Sequence[LayerFacts], anomalies: Sequence[Anomaly], every_layer: bool
) -> None:
    print_facts(_head(adapter))
    _print_anomalies(anomalies, every_layer)
    layers = {fact.name: fact for fact in facts}
    several = len(set(adapter.ranks.values())) > 1
    kinds = _by_kind(layers)
    _print_layers("layer type", kinds, several)
    if depths := _by_depth(layers):
        _print_layers("block", depths, several)
    if every_layer:
        _print_layers("layer", _single(layers), several)
    if adapter.growth is not None:
        _print_agreement(_single(layers) if every_layer else kinds)


def print_comparison(comparison: Comparison, other: str, every_layer: bool) -> None:
    console = Console()
    title = printable(f"Against {other}: principal angles, 0° where the subspaces agree")
    console.print(Text(title, style="bold"))
    groups = _single(comparison.layers) if every_layer else _by_kind(comparison.layers)
    print_figures("layer" if every_layer else "layer type, median", _ANGLES, _lines(groups, _angles))
    for where, names in (("the first", comparison.only_first), ("the second", comparison.only_second)):
        if names:
            console.print(Text(printable(f"only in {where}: {count(len(names), 'layer')}, such as {names[0]}")))


def _angles(alike: Sequence[LayerComparison]) -> list[str]:
    """Medians."""
    ratios = [both.ratio for both in alike if both.ratio is not None]
    return [
        f"{median(both.output_angles[-1] for both in alike):.1f}°",
        f"{median(both.input_angles[-1] for both in alike):.1f}°",
        f"{median(_mean(both.output_angles) for both in alike):.1f}°",
        f"{median(_mean(both.input_angles) for both in alike):.1f}°",
        f"{median(both.cosine for both in alike):.3f}",
        f"{median(ratios):.3g}" if ratios else "–",
    ]


def _head(adapter: Adapter) -> list[tuple[str, str]]:
    config, loss = adapter.config, adapter.loss
    after = loss_text(loss.after)
    ranks = describe_ranks([*adapter.ranks.values()])
    damping = f"{adapter.preconditioner.kind}, damping {adapter.preconditioner.damping:g}"
    lines = {
        "base": str(adapter.base.get("name")),
        "layers": f"{len(adapter.layers)} of rank {ranks}, {adapter.num_parameters:,} parameters",
        "settings": f"α {config.alpha:g}, γ {config.gamma:g}, {config.scaling}, s = {config.scale:.4g}, {damping}",
        "loss": f"{loss.before:.4f} → {after} by the step, on {count(loss.rows, 'row')}{' held out' * loss.held_out}",
    }
    if loss.curve:
        lines["γ"] = describe_search(adapter.gamma, loss.curve)
    if warning := warning_of(adapter.gamma, asdict(loss)):
        lines["WARNING"] = warning
    if adapter.growth is not None:
        lines["samples"] = describe_growth(asdict(adapter.growth))
    if adapter.training is not None:
        first, last = adapter.training["first_loss"], adapter.training["last_loss"]
        told = f", loss {first:.4f} → {last:.4f}" if first is not None else ""
        by = adapter.training.get("by")
        lines["trained"] = f"by {by}" if by else f"{count(adapter.training['steps'], 'step')}{told}"
    return [*lines.items()]


def _print_anomalies(anomalies: Sequence[Anomaly], every_one: bool) -> None:
    console = Console()
    if not anomalies:
        console.print("\n[bold]Nothing out of the ordinary[/bold]\n")
        return
    console.print(f"\n[bold]Out of the ordinary: {len(anomalies)}[/bold]")
    shown = anomalies if every_one else anomalies[:MAX_ANOMALIES]
    for anomaly in shown:
        console.print(Text(printable(f"  {anomaly.layer}: {anomaly.text}")))
    if len(shown) < len(anomalies):
        console.print(f"  and {len(anomalies) - len(shown)} more (--layers shows all)")
    console.print()


def _print_layers(head: str, groups: Groups[LayerFacts], several_ranks: bool) -> None:
    """Of norms and ratios the median, unless the name of the column says otherwise.

    Where ranks differ they are shown in place of σ_r/σ₁, which is then of unlike r.
    """

    def figures(layers: Sequence[LayerFacts]) -> list[str]:
        reports = [fact.report for fact in layers]
        sines = [report.sine for report in reports if report.sine is not None]
        return [
            str(len(layers)),
            f"{median(report.gradient_norm for report in reports):.2e}",
            _span(reports) if several_ranks else _ratio(reports),
            f"{min(report.captured_energy for report in reports):.1%}",
            f"{median(report.captured_energy for report in reports):.1%}",
            f"{max(sines):.0e}" if sines else "no gap",
            f"{median(fact.step_norm for fact in layers):.3g}",
        ]

    columns = ("layers", _NORM, "rank" if several_ranks else "σ_r/σ₁", *_CAPTURED)
    print_figures(head, columns, _lines(groups, figures))


def _span(reports: Sequence[LayerReport]) -> str:
    """Their ranks: 8, or 1–32."""
    ranks = [len(report.singular_values) for report in reports]
    return str(min(ranks)) if min(ranks) == max(ranks) else f"{min(ranks)}–{max(ranks)}"


def _ratio(reports: Sequence[LayerReport]) -> str:
    """Median of σ_r/σ₁."""
    ratios = [r.singular_values[-1] / r.singular_values[0] for r in reports if r.singular_values[0] > 0]
    return f"{median(ratios):.3f}" if ratios else "–"


def _print_agreement(groups: Groups[LayerFacts]) -> None:
    """How far the halves of the sample agree in each group: medians, and the least of all."""

    def figures(layers: Sequence[LayerFacts]) -> list[str]:
        sides = [fact.report.agreement for fact in layers if fact.report.agreement is not None]
        columns = [*map(median, zip(*sides, strict=True)), min(map(min, sides))] if sides else []
        cells = [f"{value:.2f}" for value in columns] or ["–"] * 3
        return [*cells, str(len(layers) - len(sides))]

    print_figures("halves of the sample agree", ("outputs", "inputs", "least", "left out"), _lines(groups, figures))


def _by_kind(layers: Mapping[str, _Item]) -> Groups[_Item]:
    """model.layers.*, and in it self_attn.q_proj …"""
    return _grouped(layers, lambda place: (f"{place.stack}.*" if place.stack else "", place.kind))


def _by_depth(layers: Mapping[str, _Item]) -> Groups[_Item]:
    """model.layers, and in it 0, 1 …; without the layers outside of all stacks."""
    inside = {name: item for name, item in layers.items() if place_of(name).depth is not None}
    return _grouped(inside, lambda place: (place.stack, str(place.depth)))


def _single(layers: Mapping[str, _Item]) -> Groups[_Item]:
    """model.layers, and in it 0.self_attn.q_proj …"""
    groups: Groups[_Item] = {}
    for name, item in layers.items():
        stack = place_of(name).stack
        groups.setdefault(stack, {})[name.removeprefix(f"{stack}.")] = [item]
    return groups


def _grouped(layers: Mapping[str, _Item], key: Callable[[Place], tuple[str, str]]) -> Groups[_Item]:
    groups: Groups[_Item] = {}
    for name, item in layers.items():
        stack, rest = key(place_of(name))
        groups.setdefault(stack, {}).setdefault(rest, []).append(item)
    return groups


def _lines(groups: Groups[_Item], figures: Callable[[Sequence[_Item]], list[str]]) -> dict[str, dict[str, list[str]]]:
    return {stack: {name: figures(items) for name, items in lines.items()} for stack, lines in groups.items()}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
