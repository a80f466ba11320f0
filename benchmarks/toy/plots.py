"""The pictures of docs/theory, from the results as theory.json holds them (None where a run diverged)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from . import linear, relu

Result = dict[str, Any]

COLOURS = {
    "full fine-tuning": "black",
    "LoRA": "tab:gray",
    "LoRA-GA": "tab:orange",
    "LoRA-SB": "tab:green",
    "LoRA-One": "tab:blue",
}


def draw_all(result: Result, directory: Path) -> list[Path]:
    directory.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, Callable[[Result], plt.Figure]] = {
        "alignment": alignment,
        "phases": phases,
        "comparison": comparison,
        "relu": relu_layer,
        "digits": digits,
    }
    paths = []
    for name, draw in pictures.items():
        figure = draw(result)
        figure.tight_layout()
        paths.append(directory / f"{name}.png")
        figure.savefig(paths[-1], dpi=90, metadata={"Software": None})
        plt.close(figure)
    return paths


def alignment(result: Result) -> plt.Figure:
    """Sine of A_t's subspace: over initial variances at one width, and its least value over widths."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for variance, colour in zip(linear.VARIANCES, shades(len(linear.VARIANCES)), strict=True):
        runs = result["alignment"][str(variance)]
        band(left, [run["sine"] for run in runs], linear.KEPT, f"{variance:g}", colour=colour)
    label(left, "step", "sine of the largest angle to G", f"A_t, width {linear.WIDTH}, by initial variance of A")
    for width, colour in zip(linear.WIDTHS, shades(len(linear.WIDTHS)), strict=True):
        best = [result["best_sine"][str(width)][str(variance)] for variance in linear.VARIANCES]
        right.errorbar(linear.VARIANCES, *middle_and_range(best), fmt="o-", capsize=3, color=colour, label=width)
    right.set_xscale("log")
    label(right, "initial variance of A", "least sine of all steps", "by width of W")
    return figure


def phases(result: Result) -> plt.Figure:
    """Plain LoRA aligns while the risk stands still, then learns; the first phase grows with log(1/scale)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    by_variance = result["alignment"]
    run = by_variance[str(linear.VARIANCES[-1])][0]
    steps = np.arange(len(run["risk"])) * linear.KEPT
    for name, values, style in (
        ("risk / risk at the start", np.array(run["risk"]) / run["risk"][0], "-"),
        ("sine of A_t to G", run["sine"], "--"),
        ("‖B_tA_t‖ / ‖Δ‖", run["size"], ":"),
    ):
        left.plot(steps, np.maximum(values, 1e-6), style, label=name)
    half = result["half_risk"][str(linear.VARIANCES[-1])][0]
    left.axvspan(0, half, color="tab:gray", alpha=0.15, label="before half of the risk is gone")
    left.set_ylim(1e-5, 3)
    label(left, "step", "", f"two phases, initial variance {linear.VARIANCES[-1]:g}")

    for variance, colour in zip(linear.VARIANCES, shades(len(linear.VARIANCES)), strict=True):
        band(right, [run["risk"] for run in by_variance[str(variance)]], linear.KEPT, f"{variance:g}", colour=colour)
    label(right, "step", "risk", "by initial variance of A")
    return figure


def comparison(result: Result) -> plt.Figure:
    return curves_by_kappa(result["comparison"], linear.KAPPAS, "linear model")


def curves_by_kappa(curves: Result, kappas: Sequence[int], title: str) -> plt.Figure:
    """Risk over steps, a panel for each κ: plain GD dashed, preconditioned solid."""
    figure, axes = plt.subplots(1, len(kappas), figsize=(10, 4.2), sharey=True)
    for axis, kappa in zip(axes, kappas, strict=True):
        runs = curves[str(kappa)]
        for name in runs[0]:
            method = name.split(",")[0]
            style = "-" if name.endswith("preconditioned") else "--"
            band(axis, [run[name] for run in runs], 1, name, colour=COLOURS[method], style=style)
        axis.set_ylim(1e-30, 1e2)
        label(axis, "step", "risk", f"{title}, κ = {kappa}", legend=kappa == kappas[0])
    return figure


def relu_layer(result: Result) -> plt.Figure:
    """How near the start is over γ, and risk over steps at both κ."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for samples, colour in zip(relu.SAMPLES, shades(len(relu.SAMPLES)), strict=True):
        errors = np.array(result["relu_start"][str(samples)]).T
        left.errorbar(
            relu.GAMMAS, *middle_and_range(errors), fmt="o-", capsize=3, color=colour, label=f"N = {samples:,}"
        )
    label(left, "γ in B₀A₀ = -γ·G_r", "‖B₀A₀ - Δ‖ / ‖Δ‖", "distance of the start, κ = 4")
    for kappa, style in zip(relu.KAPPAS, ("-", "--"), strict=True):
        for name, colour in (
            ("LoRA-One, preconditioned", "tab:blue"),
            ("LoRA-One, GD", "tab:cyan"),
            ("LoRA, GD", "tab:gray"),
        ):
            runs = [run[name] for run in result["relu"][str(kappa)]]
            band(right, runs, 1, f"{name}, κ = {kappa}", colour=colour, style=style)
    label(right, "step", "risk", "from the start with γ = 2")
    return figure


def digits(result: Result) -> plt.Figure:
    """Training loss over steps, and the trajectories of one seed on the plane that holds most of them."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2))
    picture = result["digits_plane"]
    levels = np.geomspace(np.min(picture["losses"]), np.max(picture["losses"]), 16)
    right.contour(picture["x"], picture["y"], picture["losses"], levels=levels, colors="lightgray", linewidths=0.8)
    for name, (x, y) in picture["paths"].items():
        style = "-" if name.endswith(("preconditioned", "tuning")) else "--"
        colour = COLOURS[name.split(",")[0]]
        band(left, [run[name]["losses"] for run in result["digits"]], 1, name, colour=colour, style=style)
        right.plot(x, y, style, color=colour, label=name)
        right.plot(x[0], y[0], "o", color=colour, markersize=6)
        right.plot(x[-1], y[-1], "s", color=colour, markersize=6)
    label(left, "step", "training loss, even digits", "each at its best rate without a rise")
    label(
        right, "first direction", "second direction", "weights: start ●, end ■, loss contours", log=False, legend=False
    )
    return figure


def band(
    axis: Axes, runs: Sequence[Sequence[float | None]], every: int, name: str, *, colour: Any, style: str = "-"
) -> None:
    """The median over runs, and their range shaded; ends where a run diverged."""
    length = min(len(run) for run in runs)
    values = np.array([[np.nan if v is None else v for v in run[:length]] for run in runs])
    steps = np.arange(length) * every
    axis.plot(steps, np.median(values, axis=0), style, color=colour, label=name)
    axis.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)


def middle_and_range(values: Any) -> tuple[Any, Any]:
    """Medians of the rows, and how far their least and greatest lie from them."""
    rows = np.array(values)
    middle = np.median(rows, axis=1)
    return middle, [middle - rows.min(1), rows.max(1) - middle]


def label(axis: Axes, x: str, y: str, title: str, *, log: bool = True, legend: bool = True) -> None:
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3)
    if log:
        axis.set_yscale("log")
    if legend:
        axis.legend(fontsize=8)


def shades(count: int) -> list[Any]:
    return [plt.get_cmap("viridis")(0.9 * i / max(count - 1, 1)) for i in range(count)]
