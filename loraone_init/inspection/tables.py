"""What `loraone-inspect` prints: anomalies first, then groups of layers by type and by depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..adapter.adapter import Adapter
from ..adapter.records import LayerReport
from ..adapter.wording import count, describe_growth, describe_ranks, describe_search
from ..errors import printable
from .comparison import Comparison, LayerComparison
from .facts import Anomaly, LayerFacts, by_depth, by_kind
from .layer_names import place_of

MAX_ANOMALIES = 12
_COLUMNS = ("captured min", "median", "sin∠ max", "‖ΔW‖")


def print_adapter(
    adapter: Adapter, facts: Sequence[LayerFacts], anomalies: Sequence[Anomaly], every_layer: bool
) -> None:
    console = Console()
    _print_head(console, adapter)
    _print_anomalies(console, anomalies, every_layer)
    layers = list(facts)
    kinds = {_joined(stack, kind): group for (stack, kind), group in by_kind(layers).items()}
    several = len(set(adapter.ranks.values())) > 1
    console.print(_table("layer type", kinds, several))
    depths = {_joined(stack, str(depth)): group for (stack, depth), group in by_depth(layers).items()}
    if depths:
        console.print(_table("block", depths, several))
    single = {fact.name: [fact] for fact in layers}
    if every_layer:
        console.print(_table("layer", single, several))
    if adapter.growth is not None:
        console.print(_agreement_table(single if every_layer else kinds))


def print_comparison(comparison: Comparison, other: str, every_layer: bool) -> None:
    console = Console()
    console.print(Text(f"Against {other}: principal angles, 0° where the subspaces agree", style="bold"))
    groups: dict[str, list[LayerComparison]] = {}
    for name, both in comparison.layers.items():
        place = place_of(name)
        groups.setdefault(name if every_layer else _joined(place.stack, place.kind), []).append(both)
    table = Table(box=None, pad_edge=False)
    columns = ("∠ out max", "∠ in max", "∠ out mean", "∠ in mean", "cos ΔW", "‖ΔW‖ ratio")
    table.add_column("layer" if every_layer else "layer type, median", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    for name, alike in groups.items():
        ratios = [both.ratio for both in alike if both.ratio is not None]
        table.add_row(
            Text(name),
            f"{median(both.output_angles[-1] for both in alike):.1f}°",
            f"{median(both.input_angles[-1] for both in alike):.1f}°",
            f"{median(_mean(both.output_angles) for both in alike):.1f}°",
            f"{median(_mean(both.input_angles) for both in alike):.1f}°",
            f"{median(both.cosine for both in alike):.3f}",
            f"{median(ratios):.3g}" if ratios else "–",
        )
    console.print(table)
    for where, names in (("the first", comparison.only_first), ("the second", comparison.only_second)):
        if names:
            console.print(Text(printable(f"only in {where}: {count(len(names), 'layer')}, such as {names[0]}")))


def _print_head(console: Console, adapter: Adapter) -> None:
    config, loss = adapter.config, adapter.loss
    after = "not finite" if loss.after is None else f"{loss.after:.4f}"
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
    if adapter.growth is not None:
        lines["samples"] = describe_growth(asdict(adapter.growth))
    if adapter.training is not None:
        first, last = adapter.training["first_loss"], adapter.training["last_loss"]
        told = f", loss {first:.4f} → {last:.4f}" if first is not None else ""
        by = adapter.training.get("by")
        lines["trained"] = f"by {by}" if by else f"{count(adapter.training['steps'], 'step')}{told}"
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for label, line in lines.items():
        table.add_row(label, Text(printable(line)))
    console.print(table)


def _print_anomalies(console: Console, anomalies: Sequence[Anomaly], every_one: bool) -> None:
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


def _table(head: str, groups: dict[str, list[LayerFacts]], several_ranks: bool) -> Table:
    """A line for each group; of norms and ratios the median, unless the name of the column says otherwise.

    Where ranks differ they are shown in place of σ_r/σ₁, which is then of unlike r.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column(head, no_wrap=True)
    for column in ("layers", "‖G‖", "rank" if several_ranks else "σ_r/σ₁", *_COLUMNS):
        table.add_column(column, justify="right")
    for name, layers in groups.items():
        reports = [fact.report for fact in layers]
        sines = [report.sine for report in reports if report.sine is not None]
        table.add_row(
            Text(name),
            str(len(layers)),
            f"{median(report.gradient_norm for report in reports):.2e}",
            _span(reports) if several_ranks else _ratio(reports),
            f"{min(report.captured_energy for report in reports):.1%}",
            f"{median(report.captured_energy for report in reports):.1%}",
            f"{max(sines):.0e}" if sines else "no gap",
            f"{median(fact.step_norm for fact in layers):.3g}",
        )
    return table


def _span(reports: Sequence[LayerReport]) -> str:
    """Their ranks: 8, or 1–32."""
    ranks = [len(report.singular_values) for report in reports]
    return str(min(ranks)) if min(ranks) == max(ranks) else f"{min(ranks)}–{max(ranks)}"


def _ratio(reports: Sequence[LayerReport]) -> str:
    """Median of σ_r/σ₁."""
    ratios = [r.singular_values[-1] / r.singular_values[0] for r in reports if r.singular_values[0] > 0]
    return f"{median(ratios):.3f}" if ratios else "–"


def _agreement_table(groups: dict[str, list[LayerFacts]]) -> Table:
    """How far the halves of the sample agree in each group: medians, and the least of all."""
    table = Table(box=None, pad_edge=False)
    table.add_column("halves of the sample agree", no_wrap=True)
    for column in ("outputs", "inputs", "least", "left out"):
        table.add_column(column, justify="right")
    for name, layers in groups.items():
        sides = [fact.report.agreement for fact in layers if fact.report.agreement is not None]
        columns = [*map(median, zip(*sides, strict=True)), min(map(min, sides))] if sides else []
        cells = [f"{value:.2f}" for value in columns] or ["–"] * 3
        table.add_row(Text(name), *cells, str(len(layers) - len(sides)))
    return table


def _joined(stack: str, name: str) -> str:
    return f"{stack}.*.{name}" if stack and not name.isdigit() else f"{stack}.{name}".lstrip(".")


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
