"""One self-contained page about an adapter: pictures first, then where it comes from, then every layer.

What the page shows is gathered here, as values and drawings; page.html.jinja says how it is laid out, and escapes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from statistics import median
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..adapter.adapter import Adapter
from ..adapter.wording import describe_growth, describe_ranks, loss_text, warning_of
from .charts import NUM_COLORS
from .comparison import Comparison
from .facts import Anomaly, LayerFacts, by_depth
from .figures import Figure, agreement_figures, by_stack, figures_of_stack, growth_figure, search_figure

MAX_ANOMALIES = 20


@dataclass(frozen=True)
class Bar:
    """One loss: its name, its length in percent of the largest, and its value in words."""

    name: str
    percent: str
    text: str


@dataclass(frozen=True)
class Compared:
    """The comparison with another adapter. missing: which of both has layers that the other lacks, and their names."""

    other: str
    angle: str
    cosine: str
    missing: Sequence[tuple[str, Sequence[str]]]
    figures: Sequence[Figure]
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Layers:
    """The table of all layers, and how many blocks they are in."""

    num_blocks: int
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def render_page(
    adapter: Adapter,
    facts: Sequence[LayerFacts],
    anomalies: Sequence[Anomaly],
    comparison: Comparison | None = None,
    other_name: str = "",
) -> str:
    """The page as text. It loads nothing from anywhere."""
    loss, growth = adapter.loss, adapter.growth
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_own_file("page.html.jinja"))
    return template.render(
        title=f"LoRA-One adapter of {adapter.base.get('name') or 'a model'}",
        style=Markup(_own_file("page.css")),  # ours: in quotes that are escaped it would be no style
        num_colors=NUM_COLORS,
        tiles=_tiles(adapter, facts),
        anomalies=anomalies[:MAX_ANOMALIES],
        more_anomalies=len(anomalies) - MAX_ANOMALIES,
        stacks={stack: figures_of_stack(layers) for stack, layers in by_stack(facts).items()},
        losses=_losses(adapter),
        warning=warning_of(adapter.gamma, asdict(loss)),
        search=search_figure(loss, adapter.gamma) if loss.curve else None,
        growth=describe_growth(asdict(growth)) if growth else None,
        growth_figure=growth_figure(growth) if growth else None,
        comparison=_comparison(facts, comparison, other_name) if comparison else None,
        provenance=_provenance(adapter),
        layers=_layers(facts),
    )


def _own_file(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _tiles(adapter: Adapter, facts: Sequence[LayerFacts]) -> dict[str, str]:
    loss = adapter.loss
    sines = [fact.report.sine for fact in facts if fact.report.sine is not None]
    return {
        "loss before → after the step": f"{loss_text(loss.before)} → {loss_text(loss.after)}",
        "captured energy, median": f"{median(fact.report.captured_energy for fact in facts):.1%}",
        "worst sin∠ of the SVD": f"{max(sines):.1e}" if sines else "no gaps",
        "rank, γ": f"{describe_ranks([*adapter.ranks.values()])}, {adapter.config.gamma:g}",
        "layers, parameters": f"{len(facts)}, {adapter.num_parameters:,}",
    }


def _losses(adapter: Adapter) -> list[Bar]:
    """The losses before and after the step, and after training."""
    loss, training = adapter.loss, adapter.training or {}
    rows = f"{loss.rows} rows{' held out' * loss.held_out}"
    values = {f"before the step, {rows}": loss.before, f"after the step, {rows}": loss.after}
    values |= {
        name: training[key]
        for name, key in (("first of the training", "first_loss"), ("last of the training", "last_loss"))
        if training.get(key) is not None
    }
    top = max(value for value in values.values() if value is not None)
    return [Bar(name, f"{100 * (value or 0) / top:.1f}", loss_text(value)) for name, value in values.items()]


def _comparison(facts: Sequence[LayerFacts], comparison: Comparison, other_name: str) -> Compared:
    layers = comparison.layers
    largest = [max(both.output_angles + both.input_angles) for both in layers.values()]
    cosines = {name: both.cosine for name, both in layers.items()}
    missing = (("this adapter", comparison.only_first), (other_name, comparison.only_second))
    return Compared(
        other=other_name,
        angle=f"{median(largest):.1f}°",
        cosine=f"{median(cosines.values()):.3f}",
        missing=[(where, names) for where, names in missing if names],
        figures=agreement_figures(facts, cosines),
        head=["layer", "largest angle, outputs", "largest angle, inputs", "cosine of ΔW", "‖ΔW‖ ratio"],
        rows=[
            [
                name,
                f"{max(both.output_angles):.1f}°",
                f"{max(both.input_angles):.1f}°",
                f"{both.cosine:.3f}",
                "–" if both.ratio is None else f"{both.ratio:.3g}",
            ]
            for name, both in layers.items()
        ],
    )


def _provenance(adapter: Adapter) -> list[tuple[str, str]]:
    record: dict[str, Any] = {
        **{f"base {key}": value for key, value in adapter.base.items()},
        **{f"data {key.replace('_', ' ')}": value for key, value in adapter.sample.items() if key != "options"},
        "α, scaling": f"{adapter.config.alpha:g}, {adapter.config.scaling}, s = {adapter.config.scale:.4g}",
        "target modules": adapter.config.target_modules,
        "seed": adapter.config.seed,
        "preconditioner": f"{adapter.preconditioner.kind}, damping {adapter.preconditioner.damping:g}",
        **{f"training {key.replace('_', ' ')}": value for key, value in (adapter.training or {}).items()},
    }
    return [(key, str(value)) for key, value in record.items() if value is not None]


def _layers(facts: Sequence[LayerFacts]) -> Layers:
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
    return Layers(len(by_depth(list(facts))), head, rows)
