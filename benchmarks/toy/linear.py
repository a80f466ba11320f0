"""Experiments on the linear model: exact recovery, the invariant subspace, alignment over scales, the comparison.

The paper's set-ups (arXiv 2502.01235): in = out = 100, r = 8, r* = 4, N = 16·in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from loraone_init.linalg.factors import LoraPair

from .methods import descent, lora, lora_ga, lora_one, lora_sb, risks
from .problems import LinearProblem, gaussian, linear_problem, sine, spectrum

WIDTH, RANK, TRUE_RANK, SAMPLES_PER_INPUT = 100, 8, 4, 16
KAPPAS = (4, 100)

SLOW_RATE, SLOW_STEPS = 1 / 64, 1500  # alignment
EVERY, KEPT = 5, 25  # steps from one observation to the next, and between those that are kept for the pictures
WIDTHS = (50, 100, 200)
VARIANCES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-8)  # the paper's end at 1e-4

FAST_RATE, FAST_STEPS, DAMPING = 0.5, 100, 1e-3  # comparison


def make(singular_values: Sequence[float], width: int, seed: int) -> tuple[LinearProblem, Tensor, torch.Generator]:
    """A problem, its gradient at W♮, and the generator that made it, for what is drawn next."""
    generator = torch.Generator().manual_seed(seed)
    problem = linear_problem(singular_values, width, SAMPLES_PER_INPUT * width, generator)
    return problem, problem.gradient(torch.zeros_like(problem.delta)), generator


def recovery(kappa: float, seed: int, rank: int = RANK) -> float:
    """‖B₀A₀ - ΔΣ̂‖_F/‖ΔΣ̂‖_F of LoRA-One's start; ΔΣ̂ = -G is one step of full gradient descent of length 1."""
    problem, G, generator = make(spectrum(kappa), WIDTH, seed)
    pair = lora_one(G, rank, generator)
    target = problem.delta @ problem.covariance
    return float((pair.B @ pair.A - target).norm() / target.norm())


def invariance(seed: int, std_of_B: float, std_of_A: float = 0.1, steps: int = SLOW_STEPS) -> float:
    """The largest ‖(I - UUᵀ)B_t‖_F/‖B_t‖_F over the steps of plain LoRA; U is G's top-r* left singular subspace."""
    problem, G, generator = make([1.0] * TRUE_RANK, WIDTH, seed)
    A = lora(G, RANK, std_of_A, generator).A
    B = std_of_B * gaussian((len(G), RANK), generator)
    U = torch.linalg.svd(G).U[:, :TRUE_RANK]
    pairs = islice(descent(problem, LoraPair(A, B), SLOW_RATE), 1, steps + 1)
    return max(float((pair.B - U @ (U.T @ pair.B)).norm() / pair.B.norm()) for pair in pairs)


def alignment(width: int, variance: float, seed: int) -> dict[str, list[float]]:
    """Plain LoRA from A ~ N(0, variance), B = 0, at every EVERY-th step; ends where it diverges.

    sine: of the largest angle between the top-r* right singular subspaces of A_t and of G.
    risk. size: ‖B_tA_t‖_F/‖Δ‖_F.
    """
    problem, G, generator = make([1.0] * TRUE_RANK, width, seed)
    V = torch.linalg.svd(G).Vh[:TRUE_RANK].T
    curves: dict[str, list[float]] = {"sine": [], "risk": [], "size": []}
    pairs = descent(problem, lora(G, RANK, variance**0.5, generator), SLOW_RATE)
    for pair in islice(pairs, 0, SLOW_STEPS + 1, EVERY):
        D = pair.B @ pair.A
        if not D.isfinite().all():
            break
        curves["sine"].append(sine(torch.linalg.svd(pair.A, full_matrices=False).Vh[:TRUE_RANK].T, V))
        curves["risk"].append(problem.risk(D))
        curves["size"].append(float(D.norm() / problem.delta.norm()))
    return curves


def half_risk(risk: Sequence[float]) -> int:
    """The first observed step at which half of the risk is gone; the last where it never is."""
    gone = (i for i, value in enumerate(risk) if value <= risk[0] / 2)
    return EVERY * next(gone, len(risk) - 1)


def thinned(curves: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: values[:: KEPT // EVERY] for name, values in curves.items()}


def comparison(kappa: float, seed: int) -> dict[str, list[float]]:
    """Risk at every step, by method; "LoRA-One, preconditioned" and the like."""
    problem, G, generator = make(spectrum(kappa), WIDTH, seed)
    shifted, ga = lora_ga(problem, RANK)
    starts = {
        "LoRA": (problem, lora(G, RANK, (3 * WIDTH) ** -0.5, generator)),  # the variance that PEFT draws A with
        "LoRA-GA": (shifted, ga),
        "LoRA-One": (problem, lora_one(G, RANK, generator)),
    }
    curves = {"LoRA-SB": risks(problem, lora_sb(problem, G, RANK, FAST_RATE), FAST_STEPS)}
    for name, (learnt, pair) in starts.items():
        for kind, damping in (("GD", None), ("preconditioned", DAMPING)):
            curves[f"{name}, {kind}"] = risks(learnt, descent(learnt, pair, FAST_RATE, damping), FAST_STEPS)
    return curves


def run(seeds: Sequence[int]) -> Iterator[tuple[str, Any]]:
    """(name, result) of each experiment, lists over the seeds innermost."""
    yield (
        "recovery",
        {
            "r = 8": {str(kappa): [recovery(kappa, seed) for seed in seeds] for kappa in KAPPAS},
            "r = 3": {str(kappa): [recovery(kappa, seed, rank=3) for seed in seeds] for kappa in KAPPAS},
        },
    )
    yield (
        "invariance",
        {
            "B = 0": [invariance(seed, 0.0) for seed in seeds],
            "B random": [invariance(seed, 0.01) for seed in seeds],
        },
    )
    runs = {
        width: {str(variance): [alignment(width, variance, seed) for seed in seeds] for variance in VARIANCES}
        for width in WIDTHS
    }
    yield (
        "best_sine",
        {
            str(width): {variance: [min(run["sine"]) for run in group] for variance, group in by_variance.items()}
            for width, by_variance in runs.items()
        },
    )
    shown = runs[WIDTH].items()
    yield "alignment", {variance: [thinned(run) for run in group] for variance, group in shown}
    yield "half_risk", {variance: [half_risk(run["risk"]) for run in group] for variance, group in shown}
    yield "comparison", {str(kappa): [comparison(kappa, seed) for seed in seeds] for kappa in KAPPAS}
