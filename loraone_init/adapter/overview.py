"""An adapter at a glance: one line, a text table, and the same table for notebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from statistics import median
from textwrap import TextWrapper
from typing import Any

from .wording import count, describe_growth, describe_ranks, describe_sample, describe_search, warning_of

Lines = Sequence[tuple[str, str]]
"""(what is told, in words) from the top down."""


def one_line(
    ranks: Sequence[int],
    gamma: float,
    loss: Mapping[str, Any],
    training: Mapping[str, Any] | None,
    called: str = "Adapter",
) -> str:
    """Adapter(210 layers, r=8, γ=256, loss 1.467 → 1.256). called: what stands before the brackets."""
    least, most = min(ranks, default=0), max(ranks, default=0)
    rank = f"{least}" if least == most else f"{least} to {most}"
    after = "not finite" if loss["after"] is None else f"{loss['after']:.3f}"
    trained = f", trained {_how_long(training)}" if training else ""
    return (
        f"{called}({count(len(ranks), 'layer')}, r={rank}, γ={gamma:g}, loss {loss['before']:.3f} → {after}{trained})"
    )


def overview(record: Mapping[str, Any], ranks: Sequence[int], num_parameters: int) -> Lines:
    """What the adapter is for, how large it is, and what its step does. record: of `Adapter.record`."""
    config, loss, sample, growth, training = (record[key] for key in ("config", "loss", "sample", "growth", "training"))
    layers = record["layers"].values()
    captured = [layer["captured_energy"] for layer in layers]
    odd = sum(layer["init"] != "spectral" for layer in layers)
    lines = [
        ("base model", _base(record["base"])),
        ("layers", f"{len(ranks):,} of rank {describe_ranks(ranks)}, {num_parameters:,} parameters"),
        ("scale", f"s = {record['scale']:.4g} (α = {config['alpha']:g}, {config['scaling']}), γ = {config['gamma']:g}"),
        ("data", describe_sample(sample) if sample else "batches from Python"),
        ("loss", _loss(loss)),
        *([("WARNING", warning)] if (warning := warning_of(config["gamma"], loss)) else []),
        (
            "captured energy",
            f"{min(captured):.1%} of the gradient at least, {median(captured):.1%} in the median layer",
        ),
    ]
    if odd:
        lines.append(
            ("without full gradient", f"{count(odd, 'layer')}, in part or wholly initialised as in plain LoRA")
        )
    if loss["curve"]:
        lines.append(("γ", describe_search(config["gamma"], loss["curve"])))
    if growth is not None:
        lines.append(("sample size", describe_growth(growth)))
    if training is not None:
        lines.append(("trained", _training(training)))
    return lines


def as_text(lines: Lines) -> str:
    """The lines below each other in 80 columns, what is told in a column of its own."""
    indent = 2 + max(len(label) for label, _ in lines)
    wrapper = TextWrapper(80 - indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(f"{label:<{indent}}" + f"\n{' ' * indent}".join(wrapper.wrap(text)) for label, text in lines)


def as_html(title: str, lines: Lines) -> str:
    """The same as a table; everything is escaped."""
    rows = "".join(
        f'<tr><th style="text-align: left">{escape(label)}</th><td style="text-align: left">{escape(text)}</td></tr>'
        for label, text in lines
    )
    return f"<table><caption>{escape(title)}</caption>{rows}</table>"


def _base(base: Mapping[str, Any]) -> str:
    name, revision = base.get("name"), base.get("revision")
    text = str(name) if name else "a module from Python"
    return f"{text}, revision {revision}" if revision else text


def _loss(loss: Mapping[str, Any]) -> str:
    after = "a number that is not finite" if loss["after"] is None else f"{loss['after']:.4f}"
    which = "held out of the gradient" if loss["held_out"] else "of those that the gradient is from"
    return f"{loss['before']:.4f} before the step, {after} after it, on {count(loss['rows'], 'row')} {which}"


def _training(training: Mapping[str, Any]) -> str:
    first, last = training["first_loss"], training["last_loss"]
    text = _how_long(training)
    return text if first is None else f"{text}, loss {first:.4f} → {last:.4f}"


def _how_long(training: Mapping[str, Any]) -> str:
    """Only of our own training are the steps known."""
    return f"by {training['by']}" if "by" in training else f"for {count(training['steps'], 'step')}"
