"""A two-layer network trained on odd digits and fine-tuned on even ones (arXiv 2502.01235, figure 1c), in fp64.

scikit-learn's 1,797 bundled digits of 8 × 8 pixels stand in for MNIST. The head has five classes: 1, 3, 5, 7, 9 before
and 0, 2, 4, 6, 8 after; it is kept, and the hidden layer is adapted. Every method is trained at several learning rates.
Shown is the one that ends at the lowest training loss among those at which no step raises it; the lowest at any rate,
where gradient descent jumps about first, is recorded beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy

from loraone_init.linalg.factors import LoraPair

from .methods import descent, full_descent, lora, lora_one
from .problems import FP64, TwoLayerProblem, gaussian

HIDDEN, CLASSES, RANK = 64, 5, 4
STEPS, DAMPING = 200, 1e-3
RATES = tuple(2.0**power for power in range(-8, 5))
GRID = 41  # points on a side of the plane that the trajectories are drawn on

Shifts = Callable[[float], Iterator[Tensor]]  # D₀, D₁ ... at a learning rate


@dataclass(frozen=True)
class Digits:
    """X (N, 64) in 0..1 and labels 0..4 of the digits of one parity."""

    X: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Trained:
    """A method's best run: its learning rate, D and loss at every step; and the last losses at all rates."""

    rate: float
    shifts: list[Tensor]
    losses: list[float]
    final_losses: list[float]


def read(parity: int, generator: torch.Generator) -> tuple[Digits, Digits]:
    """Two thirds and one third of the even (0) or odd (1) digits, shuffled."""
    images, digits = load_digits(return_X_y=True)
    chosen = torch.from_numpy(digits) % 2 == parity
    X, labels = torch.from_numpy(images).to(FP64)[chosen] / 16, torch.from_numpy(digits)[chosen] // 2
    order = torch.randperm(len(X), generator=generator)
    X, labels, cut = X[order], labels[order], 2 * len(X) // 3
    return Digits(X[:cut], labels[:cut]), Digits(X[cut:], labels[cut:])


def pretrain(digits: Digits, generator: torch.Generator, steps: int = 200) -> tuple[Tensor, Tensor]:
    """W♮ (hidden, 64) and V (classes, hidden), trained by Adam on the whole set."""
    weight = (gaussian((HIDDEN, digits.X.shape[1]), generator) / digits.X.shape[1] ** 0.5).requires_grad_()
    head = (gaussian((CLASSES, HIDDEN), generator) / HIDDEN**0.5).requires_grad_()
    optimizer = torch.optim.Adam([weight, head], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy((digits.X @ weight.T).relu() @ head.T, digits.labels).backward()
        optimizer.step()
    return weight.detach(), head.detach()


def train(problem: TwoLayerProblem, method: Shifts) -> Trained:
    """The method at each of RATES; the run that ends lowest among those whose loss never rises."""
    runs = []
    for rate in RATES:
        shifts = list(islice(method(rate), STEPS + 1))
        losses = [problem.risk(D) for D in shifts]
        runs.append((rate, shifts, losses))
    descending = [run for run in runs if all(later <= earlier for earlier, later in pairwise(run[2]))]
    best = min(descending, key=lambda run: run[2][-1])
    finals = [losses[-1] for *_, losses in runs]
    return Trained(*best, [final if math.isfinite(final) else math.inf for final in finals])


def adapted(problem: TwoLayerProblem, start: LoraPair, damping: float | None) -> Shifts:
    return lambda rate: (pair.B @ pair.A for pair in descent(problem, start, rate, damping))


def compare(seed: int) -> tuple[TwoLayerProblem, TwoLayerProblem, dict[str, Trained]]:
    """The problem on the digits to train on, on those held out, and each method's best run."""
    generator = torch.Generator().manual_seed(seed)
    weight, head = pretrain(read(1, generator)[0], generator)
    problem, held_out = (TwoLayerProblem(weight, head, part.X, part.labels) for part in read(0, generator))
    G = problem.gradient(torch.zeros_like(weight))
    standard = lora(G, RANK, (3 * G.shape[1]) ** -0.5, generator)
    runs = {"full fine-tuning": train(problem, lambda rate: full_descent(problem, torch.zeros_like(weight), rate))}
    spectral = lora_one(G, RANK, generator, step=runs["full fine-tuning"].rate)  # one step of full fine-tuning
    for name, pair, damping in (
        ("LoRA, GD", standard, None),
        ("LoRA, preconditioned", standard, DAMPING),
        ("LoRA-One, GD", spectral, None),
        ("LoRA-One, preconditioned", spectral, DAMPING),
    ):
        runs[name] = train(problem, adapted(problem, pair, damping))
    return problem, held_out, runs


def summarise(held_out: TwoLayerProblem, runs: dict[str, Trained]) -> dict[str, Any]:
    full = runs["full fine-tuning"].shifts[-1]
    return {
        name: {
            "rate": run.rate,
            "final_losses": run.final_losses,
            "losses": run.losses,
            "accuracy": held_out.accuracy(run.shifts[-1]),
            "distance": float((run.shifts[-1] - full).norm() / full.norm()),
        }
        for name, run in runs.items()
    }


def plane(problem: TwoLayerProblem, runs: dict[str, Trained]) -> dict[str, Any]:
    """The trajectories in the plane through D = 0 of their two leading directions, and the loss on that plane."""
    paths = {name: torch.stack(run.shifts).flatten(1) for name, run in runs.items()}
    axes = torch.linalg.svd(torch.cat(list(paths.values())), full_matrices=False).Vh[:2]
    flat = {name: path @ axes.T for name, path in paths.items()}
    points = torch.cat(list(flat.values()))
    margin = 0.15 * (points.amax(0) - points.amin(0))
    low, high = points.amin(0) - margin, points.amax(0) + margin
    x, y = (torch.linspace(float(low[i]), float(high[i]), GRID, dtype=FP64) for i in range(2))
    losses = [[problem.risk((i * axes[0] + j * axes[1]).view_as(problem.weight)) for i in x] for j in y]
    return {
        "paths": {name: path.T.tolist() for name, path in flat.items()},
        "x": x.tolist(),
        "y": y.tolist(),
        "losses": losses,
    }


def run(seeds: Sequence[int]) -> Iterator[tuple[str, Any]]:
    results = []
    for seed in seeds:
        problem, held_out, runs = compare(seed)
        results.append(summarise(held_out, runs))
        if seed == seeds[0]:
            picture = plane(problem, runs)
    yield "digits", results
    yield "digits_plane", picture
