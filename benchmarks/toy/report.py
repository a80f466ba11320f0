"""The results in words and tables: what theory says, what was seen, and whether it holds. Fills docs/theory.md."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from . import linear, relu

Result = dict[str, Any]

SHOWN_STEPS = (0, 10, 20, 50, 100)
FAR = 1e-6
"""A curve is compared by the steps it needs to bring the risk to this share of its start."""


@dataclass(frozen=True)
class Claim:
    source: str
    says: str
    seen: str
    holds: bool


def claims(result: Result) -> list[Claim]:
    return [
        recovery(result),
        invariance(result),
        alignment(result),
        phases(result),
        preconditioned(result["comparison"], linear.KAPPAS, "App. C.3, linear model"),
        plateaus(result),
        relu_start(result),
        preconditioned(result["relu"], relu.KAPPAS, "Thm 4.2, ReLU"),
        digits_path(result),
        digits_speed(result),
    ]


def recovery(result: Result) -> Claim:
    exact, short = (worst(result["recovery"][key].values()) for key in ("r = 8", "r = 3"))
    return Claim(
        "Linear model",
        "r ≥ r*: B₀A₀ = ΔΣ̂",
        f"relative error at most {exact:.1e}; with r = 3 < r* up to {short:.1e}",
        exact < 1e-12 < short,
    )


def invariance(result: Result) -> Claim:
    zero, random = max(result["invariance"]["B = 0"]), min(result["invariance"]["B random"])
    return Claim(
        "Thm 3.1",
        "from B₀ = 0, B_t stays in G's top-r* left singular subspace",
        f"share outside at most {zero:.1e}; from a random B₀ {random:.1e}",
        zero < 1e-12 < random,
    )


def alignment(result: Result) -> Claim:
    """From variances that do not align at all to small ones that do, without a rise beyond noise."""
    best = {
        width: [median(sines) for sines in by_variance.values()] for width, by_variance in result["best_sine"].items()
    }
    return Claim(
        "Thm 3.2",
        "A_t aligns with G's right subspace, better from a smaller start, at every width",
        f"least sine {', '.join(f'{value:.2f}' for value in best[str(linear.WIDTH)])} for variance"
        f" {', '.join(f'{variance:g}' for variance in linear.VARIANCES)}",
        all(later <= 1.01 * earlier for sines in best.values() for earlier, later in pairwise(sines))
        and all(sines[0] > 0.9 and sines[-1] < 0.1 for sines in best.values()),
    )


def phases(result: Result) -> Claim:
    """How much later half of the risk is gone, between two small variances."""
    early, late = (median(result["half_risk"][str(variance)]) for variance in (1e-4, 1e-8))
    slope, predicted = (late - early) / (math.log(1e4) / 2), 1 / math.log1p(linear.SLOW_RATE)
    return Claim(
        "Thm 3.2",
        f"a start smaller by a factor e takes 1/ln(1 + η) = {predicted:.0f} steps longer",
        f"{slope:.0f} steps, from variance 1e-4 to 1e-8",
        abs(slope / predicted - 1) < 0.1,
    )


def preconditioned(curves: Result, kappas: Sequence[int], source: str) -> Claim:
    steps = {
        kind: [median(steps_to(run[f"LoRA-One, {kind}"]) for run in curves[str(kappa)]) for kappa in kappas]
        for kind in ("preconditioned", "GD")
    }
    (low, high), (plain_low, plain_high) = steps["preconditioned"], steps["GD"]
    return Claim(
        source,
        f"preconditioned GD from LoRA-One's start is as fast at κ = {kappas[1]} as at {kappas[0]}; plain GD is not",
        f"steps to {FAR:g} of the risk: {count(low)} and {count(high)} preconditioned,"
        f" {count(plain_low)} and {count(plain_high)} plain",
        high <= 1.25 * low and plain_high >= 2 * plain_low,
    )


def plateaus(result: Result) -> Claim:
    last = {
        name: [median(finite(run[name][-1]) for run in result["comparison"][str(kappa)]) for kappa in linear.KAPPAS]
        for name in ("LoRA-GA, preconditioned", "LoRA-SB", "LoRA-One, preconditioned")
    }
    ga, sb, one = last.values()
    return Claim(
        "Figure 4",
        "LoRA-GA's and LoRA-SB's risks stop falling, LoRA-One's does not",
        f"last risk at κ = 4 and 100: LoRA-GA {pair(ga)}, LoRA-SB {pair(sb)}, LoRA-One {pair(one)}",
        min(*ga, *sb) > 1e-4 and max(one) < 1e-20,
    )


def relu_start(result: Result) -> Claim:
    errors = {samples: columns(runs) for samples, runs in result["relu_start"].items()}
    best = [relu.GAMMAS[values.index(min(values))] for values in errors.values()]
    at_two = [values[relu.GAMMAS.index(2.0)] for values in errors.values()]
    return Claim(
        "Thm 4.2",
        "γ = 2 is right for ReLU: the start nears Δ as N grows",
        f"best γ {', '.join(f'{gamma:g}' for gamma in best)}; distance {', '.join(f'{e:.2f}' for e in at_two)}"
        f" at γ = 2, N = {', '.join(f'{samples:,}' for samples in relu.SAMPLES)}",
        best[-1] == 2.0 and falling(at_two),
    )


def digits_path(result: Result) -> Claim:
    runs = result["digits"]
    return Claim(
        "Figure 1c",
        "on digits, LoRA-One stays nearer to full fine-tuning than LoRA (plain GD)",
        f"distance at the end {ahead(runs, lambda run: run['distance'])}",
        all(run["LoRA-One, GD"]["distance"] < run["LoRA, GD"]["distance"] for run in runs),
    )


def digits_speed(result: Result) -> Claim:
    runs = result["digits"]
    return Claim(
        "Figure 1c",
        "on digits, LoRA-One's loss is lower from the start (plain GD)",
        f"loss after 10 steps {ahead(runs, lambda run: run['losses'][10])}",
        all(run["LoRA-One, GD"]["losses"][10] < run["LoRA, GD"]["losses"][10] for run in runs),
    )


def ahead(runs: Sequence[Result], value: Callable[[Result], float]) -> str:
    """Medians of LoRA-One's and LoRA's values, and in how many seeds LoRA-One's is lower."""
    one, plain = ([value(run[f"{name}, GD"]) for run in runs] for name in ("LoRA-One", "LoRA"))
    lower = sum(ours < theirs for ours, theirs in zip(one, plain, strict=True))
    return f"{median(one):.2f} against {median(plain):.2f}; lower for {lower} of {len(runs)} seeds"


def tables(result: Result) -> str:
    """Markdown: the claims, the comparison's risks, and the digits."""
    parts = [
        table(
            ("Source", "Theory says", "Seen", "Holds"),
            ((c.source, c.says, c.seen, "yes" if c.holds else "**no**") for c in claims(result)),
        )
    ]
    for kappa in linear.KAPPAS:
        runs = result["comparison"][str(kappa)]
        rows = ((name, *(f"{middle(runs, name, step):.1e}" for step in SHOWN_STEPS)) for name in runs[0])
        parts.append(f"Risk of the linear model, κ = {kappa}, median over seeds:")
        parts.append(table(("Method", *(f"step {step}" for step in SHOWN_STEPS)), rows))
    parts.append("Even digits, medians over seeds, each method at the learning rate that ends lowest without a rise:")
    parts.append(digits_table(result["digits"]))
    return "\n\n".join(parts)


def digits_table(runs: Sequence[Result]) -> str:
    def middle_of(name: str, value: Callable[[Result], float]) -> float:
        return median(value(run[name]) for run in runs)

    rows = (
        (
            name,
            f"{middle_of(name, lambda run: run['rate']):g}",
            f"{middle_of(name, lambda run: run['losses'][10]):.2f}",
            f"{middle_of(name, lambda run: run['losses'][-1]):.3f}",
            f"{middle_of(name, lambda run: min(map(finite, run['final_losses']))):.3f}",
            f"{middle_of(name, lambda run: run['accuracy']):.3f}",
            f"{middle_of(name, lambda run: run['distance']):.2f}",
        )
        for name in runs[0]
    )
    header = ("Method", "rate", "loss, step 10", "last loss", "last loss, any rate", "held-out accuracy", "distance")
    return table(header, rows)


def fill(document: str, result: Result) -> str:
    """The document with what is between its two marks replaced by the tables."""
    begin, end = "<!-- tables: written by benchmarks/theory.py -->", "<!-- end of tables -->"
    filled, found = re.subn(f"{begin}.*?{end}", lambda _: f"{begin}\n\n{tables(result)}\n\n{end}", document, flags=re.S)
    if found != 1:
        raise ValueError(f"expected {begin} … {end} once, found it {found} times")
    return filled


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def middle(runs: Sequence[Result], name: str, step: int) -> float:
    return median(finite(run[name][step]) for run in runs)


def finite(value: float | None) -> float:
    """JSON has no infinity: None stands for a run that diverged."""
    return math.inf if value is None else value


def steps_to(risk: Sequence[float | None], share: float = FAR) -> float:
    start = finite(risk[0])
    return next((step for step, value in enumerate(risk) if finite(value) <= share * start), math.inf)


def count(steps: float) -> str:
    return f"{steps:.0f}" if steps < math.inf else "never"


def pair(values: Sequence[float]) -> str:
    return " and ".join(f"{value:.1e}" for value in values)


def columns(rows: Sequence[Sequence[float]]) -> list[float]:
    return [median(column) for column in zip(*rows, strict=True)]


def worst(lists: Iterable[Sequence[float]]) -> float:
    return max(map(max, lists))


def falling(values: Sequence[float]) -> bool:
    return all(later < earlier for earlier, later in pairwise(values))
