"""The nonlinear case (arXiv 2502.01235, Theorem 4.2): one ReLU layer, Gaussian inputs.

Half of the inputs pass each unit, so E[G] ≈ -Δ/2, and the start is right with γ = 2 in the paper's B₀A₀ = -γ·G_r.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .methods import descent, lora, lora_one, risks
from .problems import ReluProblem, relu_problem, spectrum

WIDTH, RANK = 100, 4  # the exact rank of Δ
GAMMAS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
SAMPLES = (1_600, 6_400, 25_600, 102_400)
KAPPAS = (4, 100)
NUM_SAMPLES, LEARNING_RATE, STEPS, DAMPING = 6_400, 1.0, 80, 1e-3  # twice the linear model's rate, half its curvature


def make(kappa: float, num_samples: int, seed: int) -> tuple[ReluProblem, torch.Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    problem = relu_problem(spectrum(kappa), WIDTH, num_samples, generator)
    return problem, problem.gradient(torch.zeros_like(problem.delta)), generator


def start_errors(num_samples: int, seed: int) -> list[float]:
    """‖B₀A₀ - Δ‖_F/‖Δ‖_F for each of GAMMAS, κ = 4."""
    problem, G, generator = make(4, num_samples, seed)
    pairs = [lora_one(G, RANK, generator, step=gamma) for gamma in GAMMAS]
    return [float((pair.B @ pair.A - problem.delta).norm() / problem.delta.norm()) for pair in pairs]


def convergence(kappa: float, seed: int) -> dict[str, list[float]]:
    """Risk at every step, by method."""
    problem, G, generator = make(kappa, NUM_SAMPLES, seed)
    curves = {}
    for name, pair in (
        ("LoRA", lora(G, RANK, (3 * WIDTH) ** -0.5, generator)),
        ("LoRA-One", lora_one(G, RANK, generator, step=2.0)),
    ):
        for kind, damping in (("GD", None), ("preconditioned", DAMPING)):
            curves[f"{name}, {kind}"] = risks(problem, descent(problem, pair, LEARNING_RATE, damping), STEPS)
    return curves


def run(seeds: Sequence[int]) -> Iterator[tuple[str, Any]]:
    yield "relu_start", {str(samples): [start_errors(samples, seed) for seed in seeds] for samples in SAMPLES}
    yield "relu", {str(kappa): [convergence(kappa, seed) for seed in seeds] for kappa in KAPPAS}
