"""What the runs show: the tables of docs/results.md, and the picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from .methods import METHODS, Method
from .plan import at_an_end, best_rate, losses_by_rate
from .runs import Record

TITLES = {"gsm8k": "SmolLM2-135M, GSM8K", "newsgroups": "all-MiniLM-L6-v2, 20 Newsgroups"}
REFERENCE = "rslora"


def line(record: Record) -> str:
    """One finished run, for the terminal."""
    loss = "diverged" if record["loss"] is None else f"{record['loss']:.4f}"
    return (
        f"{record['problem']:10} r={record['rank']:<3} {record['method']:16} lr {record['learning_rate']:.1e}"
        f" seed {record['seed']}  {loss}  {record['train_seconds']:.0f} s"
    )


def cases(records: Iterable[Record]) -> list[tuple[str, int]]:
    return sorted({(record["problem"], record["rank"]) for record in records})


@dataclass(frozen=True)
class Case:
    """One method's runs of a problem and rank. sweep: loss by learning rate with the first seed; runs: at the best."""

    method: Method
    sweep: dict[float, float]
    runs: list[Record]

    @property
    def losses(self) -> list[float]:
        """Infinite where the training diverged."""
        return [math.inf if run["loss"] is None else run["loss"] for run in self.runs]

    @property
    def rate(self) -> str:
        """The best one; marked where the sweep ends there."""
        if not self.method.trained:
            return ""
        return f"{self.runs[0]['learning_rate']:.1e}{'*' if at_an_end(self.sweep) else ''}"


def cases_of(records: Iterable[Record], problem: str, rank: int) -> dict[str, Case]:
    """By method, in order of their mean loss."""
    found = {}
    for name, method in METHODS.items():
        own = [r for r in records if (r["problem"], r["method"], r["rank"]) == (problem, name, rank)]
        if own:
            sweep = losses_by_rate(own, name, rank, min(r["seed"] for r in own))
            best = [run for run in own if run["learning_rate"] == best_rate(sweep)]
            found[name] = Case(method, sweep, sorted(best, key=lambda run: run["seed"]))
    return dict(sorted(found.items(), key=lambda item: mean(item[1].losses)))


def markdown(records: Sequence[Record]) -> str:
    """A table for each problem and rank, methods in order of their mean loss."""
    return "\n\n".join(_table(records, problem, rank) for problem, rank in cases(records))


def _table(records: Sequence[Record], problem: str, rank: int) -> str:
    found = cases_of(records, problem, rank)
    reference = {run["seed"]: run["loss"] for run in found[REFERENCE].runs} if REFERENCE in found else {}
    lines = [
        f"**{TITLES[problem]}, r = {rank}**",
        "",
        "| method | best lr | seeds | held-out loss | against rsLoRA | right | start, s | training, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in found.values():
        runs = [run for run in case.runs if run["loss"] is not None]
        diverged = len(case.runs) - len(runs)
        loss = spread([run["loss"] for run in runs]) if runs else ""
        loss += f" diverged in {diverged}" if diverged else ""
        known = [(run["loss"], reference[run["seed"]]) for run in runs if reference.get(run["seed"]) is not None]
        apart = spread([own - other for own, other in known], "+.4f") if known else ""
        right = f"{mean(run['accuracy'] for run in runs):.1%}" if runs else ""
        seconds = [mean(run[key] for run in case.runs) for key in ("init_seconds", "train_seconds")]
        lines.append(
            f"| {case.method.label} | {case.rate} | {len(case.runs)} | {loss} | {apart} | {right} |"
            f" {seconds[0]:.0f} | {seconds[1]:.0f} |"
        )
    return "\n".join(lines)


def spread(values: Sequence[float], form: str = ".4f") -> str:
    """Mean, and least to greatest."""
    text = f"{mean(values):{form}}"
    return text if len(values) == 1 else f"{text} ({min(values):{form}} to {max(values):{form}})"


def start_of(method: Method) -> tuple[object, ...]:
    """Methods of one start have one colour, the preconditioned ones dashed."""
    return method.start, method.scaling, method.gamma


def draw(records: Sequence[Record], path: Path) -> None:
    """Held-out loss against learning rate, and against steps at each one's best; a row for each problem and rank."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = cases(records)
    if not rows:
        return
    starts = list(dict.fromkeys(map(start_of, METHODS.values())))
    colours = dict(zip(starts, plt.get_cmap("tab10").colors, strict=False))
    figure, axes = plt.subplots(len(rows), 2, figsize=(12, 4.6 * len(rows)), layout="constrained", squeeze=False)
    for (left, right), (problem, rank) in zip(axes, rows, strict=True):
        found = cases_of(records, problem, rank)
        for case in found.values():
            style: dict[str, Any] = {"color": colours[start_of(case.method)], "label": case.method.label}
            if not case.method.trained:
                left.axhline(mean(case.losses), linestyle=":", **style)
                continue
            marks = "--" if case.method.preconditioned else "-"
            left.plot(list(case.sweep), list(case.sweep.values()), f"o{marks}", **style)
            _draw_curve(right, case.runs, marks, style)
        losses = [r["loss"] for r in records if (r["problem"], r["rank"]) == (problem, rank) and r["loss"] is not None]
        best = min(losses)
        left.set(xscale="log", xlabel="learning rate", ylabel="held-out loss", title=f"{TITLES[problem]}, r = {rank}")
        lowest = min(min(case.sweep.values()) for case in found.values() if case.method.trained)
        left.set_ylim(lowest * 0.99, lowest * 1.3)
        right.set(xlabel="step", ylabel="held-out loss", title="at each one's best rate, mean of the later seeds")
        right.set_ylim(best * 0.99, None)
        rates = sorted({rate for case in found.values() if case.method.trained for rate in case.sweep})
        left.set_xticks(rates, labels=[f"{rate:.2g}" for rate in rates], rotation=45)
        left.minorticks_off()
        right.legend(*left.get_legend_handles_labels(), fontsize="small", loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def _draw_curve(axis: Any, runs: Sequence[Record], marks: str, style: dict[str, Any]) -> None:
    """The mean of the runs that were evaluated on their way, at the same steps as the last."""
    curves = [{point["step"]: point["loss"] for point in run["evaluations"]} for run in runs if run["loss"] is not None]
    curves = [curve for curve in curves if len(curve) > 1 and curve.keys() == curves[-1].keys()]
    if curves:
        steps = list(curves[-1])
        axis.plot(steps, [mean(curve[step] for curve in curves) for step in steps], marks, **style)
