"""What the runs show: the README's table, and the picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from .methods import METHODS
from .plan import best_rate, losses_by_rate
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


def at_best(records: Iterable[Record], problem: str, method: str, rank: int) -> list[Record]:
    """The runs of all seeds at the rate that was best with the first, by seed."""
    own = [r for r in records if (r["problem"], r["method"], r["rank"]) == (problem, method, rank)]
    if not own:
        return []
    rate = best_rate(losses_by_rate(own, method, rank, min(r["seed"] for r in own)))
    return sorted((r for r in own if r["learning_rate"] == rate), key=lambda r: r["seed"])


def markdown(records: Sequence[Record]) -> str:
    """A table for each problem and rank, methods in order of their mean loss."""
    return "\n\n".join(_table(records, problem, rank) for problem, rank in cases(records))


def _table(records: Sequence[Record], problem: str, rank: int) -> str:
    found = {name: at_best(records, problem, name, rank) for name in METHODS}
    complete = {name: runs for name, runs in found.items() if runs and all(r["loss"] is not None for r in runs)}
    reference = {r["seed"]: r["loss"] for r in complete.get(REFERENCE, [])}
    lines = [
        f"**{TITLES[problem]}, r = {rank}**",
        "",
        "| method | best lr | held-out loss | against rsLoRA | right | start, s | training, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in sorted(complete.items(), key=lambda item: mean(r["loss"] for r in item[1])):
        rate = f"{runs[0]['learning_rate']:.1e}" if METHODS[name].trained else ""
        apart = [r["loss"] - reference[r["seed"]] for r in runs if r["seed"] in reference]
        lines.append(
            f"| {METHODS[name].label} | {rate} | {spread([r['loss'] for r in runs])} |"
            f" {spread(apart, '+.4f') if apart else ''} | {mean(r['accuracy'] for r in runs):.1%} |"
            f" {mean(r['init_seconds'] for r in runs):.0f} | {mean(r['train_seconds'] for r in runs):.0f} |"
        )
    return "\n".join(lines)


def spread(values: Sequence[float], form: str = ".4f") -> str:
    """Mean, and least to greatest."""
    text = f"{mean(values):{form}}"
    return text if len(values) == 1 else f"{text} ({min(values):{form}} to {max(values):{form}})"


def draw(records: Sequence[Record], path: Path) -> None:
    """Held-out loss against learning rate, and against steps at each one's best; a row for each problem and rank."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = cases(records)
    if not rows:
        return
    colours = dict(zip(METHODS, plt.get_cmap("tab20").colors, strict=False))
    figure, axes = plt.subplots(len(rows), 2, figsize=(12, 4.6 * len(rows)), layout="constrained", squeeze=False)
    for (left, right), (problem, rank) in zip(axes, rows, strict=True):
        for name, method in METHODS.items():
            runs = at_best(records, problem, name, rank)
            if not runs:
                continue
            style: dict[str, Any] = {"color": colours[name], "label": method.label}
            if not method.trained:
                left.axhline(mean(r["loss"] for r in runs if r["loss"] is not None), linestyle=":", **style)
                continue
            own = [r for r in records if r["problem"] == problem]
            sweep = losses_by_rate(own, name, rank, min(r["seed"] for r in own))
            left.plot(list(sweep), list(sweep.values()), "o--" if method.preconditioned else "o-", **style)
            _draw_curve(right, runs, method.preconditioned, style)
        losses = [r["loss"] for r in records if (r["problem"], r["rank"]) == (problem, rank) and r["loss"] is not None]
        best = min(losses)
        left.set(xscale="log", xlabel="learning rate", ylabel="held-out loss", title=f"{TITLES[problem]}, r = {rank}")
        left.set_ylim(best * 0.99, best * 1.25)
        right.set(xlabel="step", ylabel="held-out loss", title="at each one's best rate, mean of seeds")
        right.set_ylim(best * 0.99, None)
        right.legend(fontsize="small")
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def _draw_curve(axis: Any, runs: Sequence[Record], preconditioned: bool, style: dict[str, Any]) -> None:
    curves = [r["evaluations"] for r in runs if len(r["evaluations"]) > 1 and r["loss"] is not None]
    if curves:
        steps = [point["step"] for point in curves[0]]
        axis.plot(
            steps,
            [mean(p["loss"] for p in at) for at in zip(*curves, strict=True)],
            "--" if preconditioned else "-",
            **style,
        )
