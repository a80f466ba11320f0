"""The summary of a run: a table, or JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from ..adapter.adapter import Adapter
from ..adapter.files import DIRECTORY_FILES, is_single_file
from ..adapter.wording import count, describe_growth, describe_sample, describe_search, loss_text, warning_of
from ..errors import printable
from ..layers.expert_layout import expert_names
from ..machine import Peaks, describe_size
from ..monitor import Monitor
from ..terminal import print_facts
from .trainer_lines import lines_for_trainers

_RATES = """\
As for rsLoRA, and higher than PiSSA and LoRA-GA want: on SmolLM2-135M the best of
LoRA-One and rsLoRA was 2e-3. loraone-train --learning-rate auto tries some."""
"""From docs/results.md."""


def summarize(
    adapter: Adapter,
    output: Path,
    monitor: Monitor,
    processes: Sequence[Peaks],
    opened_from: str | None = None,
    left_out: int = 0,
) -> dict[str, Any]:
    """The run's figures: what --json prints, and the table shows.

    processes: the peaks of each. opened_from: see `lines_for_trainers`. left_out: layers for images and sound.
    """
    resident, device = zip(*processes, strict=True)
    layers = adapter.layers.values()
    captured = [layer.captured_energy for layer in layers]
    sines = [layer.sine for layer in layers if layer.sine is not None]
    files = [output] if is_single_file(output) else [output / name for name in DIRECTORY_FILES]
    return {
        "output": str(output),
        "output_bytes": sum(file.stat().st_size for file in files),
        "base": adapter.base.get("name"),
        "layers": len(adapter.layers),
        "vision_layers_left_out": left_out,
        "experts": _summarize_experts(adapter),
        "parameters": adapter.num_parameters,
        "rank": adapter.config.rank,
        "ranks": _summarize_ranks(adapter),
        "alpha": adapter.config.alpha,
        "gamma": adapter.gamma,
        "scaling": adapter.config.scaling,
        "captured_energy_min": min(captured),
        "captured_energy_median": median(captured),
        "largest_sine": max(sines, default=None),
        "layers_without_gap": len(adapter.layers) - len(sines),
        "layers_not_spectral": {name: layer.init for name, layer in adapter.layers.items() if layer.init != "spectral"},
        "sample": dict(adapter.sample),
        "growth": None if adapter.growth is None else asdict(adapter.growth),
        "loss": asdict(adapter.loss),
        "schedule": None if monitor.schedule is None else dict(zip(("chosen", "why"), monitor.schedule, strict=True)),
        "warning": warning_of(adapter.gamma, asdict(adapter.loss)),
        "seconds": {stage: round(seconds, 3) for stage, seconds in monitor.seconds.items()},
        "processes": len(processes),
        "peak_memory_bytes": max((peak for peak in resident if peak is not None), default=None),
        "trainers": lines_for_trainers(adapter, output, opened_from),
        "peak_device_memory_bytes": max((peak for peak in device if peak is not None), default=None),
    }


def _summarize_ranks(adapter: Adapter) -> dict[str, float] | None:
    """Of the layers, where a budget or their shapes gave them several."""
    ranks = adapter.ranks.values()
    if adapter.config.rank_budget is None and len(set(ranks)) == 1:
        return None
    return {"min": min(ranks), "median": median(ranks), "max": max(ranks), "total": sum(ranks)}


def _summarize_experts(adapter: Adapter) -> dict[str, int] | None:
    """How many of the layers are an expert's matrix, and to how many of these no token came that has a gradient."""
    inits = [adapter.layers[name].init for name in expert_names(adapter.experts)]
    return {"matrices": len(inits), "without_gradient": inits.count("standard")} if inits else None


def print_summary(summary: Mapping[str, Any], as_json: bool) -> None:
    """JSON on standard output, or a table."""
    if as_json:
        print(json.dumps(summary, indent=2, allow_nan=False))
    else:
        _print_table(summary)


def print_warning(summary: Mapping[str, Any]) -> None:
    """Say loudly, on standard error, that the step does not lower the loss, where that is so."""
    if summary["warning"] is not None:
        text = printable(f"WARNING: {summary['warning']}.")
        Console(stderr=True).print(text, style="bold red", markup=False, soft_wrap=True)


def left_out_facts(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A line of the table, for models with layers for images or sound."""
    number = content["vision_layers_left_out"]
    return [("left out", f"{number} layers for images and sound (--vision-layers adapts them too)")] if number else []


def _print_table(summary: Mapping[str, Any]) -> None:
    sample = summary["sample"]
    facts = [
        ("base", str(summary["base"])),
        ("layers", f"{summary['layers']} of rank {_describe_ranks(summary)}, {summary['parameters']:,} parameters"),
        *left_out_facts(summary),
        *([("experts", _describe_experts(summary["experts"]))] if summary["experts"] else []),
        ("data", describe_sample(sample)),
        *([("samples", describe_growth(summary["growth"]))] if summary["growth"] else []),
        (
            "captured energy",
            f"{summary['captured_energy_min']:.1%} min, {summary['captured_energy_median']:.1%} median",
        ),
        ("SVD accuracy", _describe_accuracy(summary)),
        ("loss", _describe_loss(summary["loss"])),
        *([("γ", describe_search(summary["gamma"], summary["loss"]["curve"]))] if summary["loss"]["curve"] else []),
        *([("schedule", "{chosen}: {why}".format_map(summary["schedule"]))] if summary["schedule"] else []),
        ("seconds", ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in summary["seconds"].items())),
        ("peak memory", _describe_peak(summary)),
        ("written", f"{summary['output']} ({summary['output_bytes'] / 2**20:.1f} MiB)"),
        *([("published", summary["published"])] if summary.get("published") else []),
    ]
    odd = summary["layers_not_spectral"]
    if odd:
        text = f"{count(len(odd), 'layer')} with a gradient of lower rank, or none, such as {next(iter(odd))}"
        facts.append(("standard rows", text))
    print_facts(facts)
    console = Console()
    for trainer, lines in summary["trainers"].items():
        console.print(f"\n[bold]{trainer}[/bold]")
        console.print(printable(lines), markup=False, highlight=False, soft_wrap=True)
    console.print(f"\n[bold]Learning rate[/bold]\n{_RATES}", highlight=False, soft_wrap=True)


def _describe_ranks(summary: Mapping[str, Any]) -> str:
    ranks = summary["ranks"]
    if ranks is None:
        return str(summary["rank"])
    return f"{ranks['min']} to {ranks['max']} (median {ranks['median']:g}, {ranks['total']:,} together)"


def _describe_experts(experts: Mapping[str, int]) -> str:
    text = f"{experts['matrices']:,} of the layers are matrices of experts"
    unmet = experts["without_gradient"]
    return f"{text}, {unmet:,} of them met no token and start as in plain LoRA" if unmet else text


def _describe_peak(summary: Mapping[str, Any]) -> str:
    peak, device = summary["peak_memory_bytes"], summary["peak_device_memory_bytes"]
    text = "unknown" if peak is None else describe_size(peak)
    text = text if device is None else f"{text}, {describe_size(device)} on the device"
    return text if summary["processes"] == 1 else f"{text}; the largest of {summary['processes']} processes"


def _describe_loss(loss: Mapping[str, Any]) -> str:
    after = loss_text(loss["after"])
    rows = count(loss["rows"], "row")
    if loss["held_out"]:
        return f"{loss['before']:.4f} → {after} on {rows} held out ({loss['sample']:.4f} before, on the others)"
    return f"{loss['before']:.4f} → {after} on {rows} of those the gradient is from ({loss['sample']:.4f} on all)"


def _describe_accuracy(summary: Mapping[str, Any]) -> str:
    worst = summary["largest_sine"]
    text = "no layer has a gap after rank r" if worst is None else f"sin∠ ≤ {worst:.1e} in every layer"
    if worst is not None and summary["layers_without_gap"]:
        text += f" but {summary['layers_without_gap']} without a gap after rank r"
    return text
