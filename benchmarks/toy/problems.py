"""Toy problems of the theory, in fp64: a layer W♮ (out, in) whose weight is to change by a shift D (out, in).

Each gives the gradient ∇L(W♮ + D) (out, in) of a full-batch loss, in closed form, and a risk. The orientation is the
library's, y = W·x; the paper (arXiv 2502.01235) writes y = Wᵀx, so that its A is our Aᵀ and its left singular subspaces
are our right ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot

FP64 = torch.float64


class Problem(Protocol):
    def gradient(self, D: Tensor) -> Tensor:
        """∇L(W♮ + D) (out, in), of the training loss."""

    def risk(self, D: Tensor) -> float:
        """What is plotted: the population risk where it is known, the training loss elsewhere."""


@dataclass(frozen=True)
class LinearProblem:
    """L(D) = ‖X·(D - Δ)ᵀ‖²_F/(2N), which is y = (W♮ + Δ)·x to be learnt from N samples; W♮ cancels.

    delta: Δ (out, in). covariance: Σ̂ = XᵀX/N (in, in) of Gaussian inputs with E[xxᵀ] = I.
    """

    delta: Tensor
    covariance: Tensor

    def gradient(self, D: Tensor) -> Tensor:
        return (D - self.delta) @ self.covariance

    def risk(self, D: Tensor) -> float:
        """‖D - Δ‖²_F/2, the expected loss of a new sample."""
        return float((D - self.delta).square().sum() / 2)


@dataclass(frozen=True)
class ReluProblem:
    """L(D) = ‖σ(X·(W♮ + D)ᵀ) - σ(X·(W♮ + Δ)ᵀ)‖²_F/(2N) with σ = ReLU.

    weight: W♮ (out, in). delta: Δ (out, in). X (N, in). Y = σ(X·(W♮ + Δ)ᵀ) (N, out).
    """

    weight: Tensor
    delta: Tensor
    X: Tensor
    Y: Tensor

    def gradient(self, D: Tensor) -> Tensor:
        Z = self.X @ (self.weight + D).T
        return ((Z.relu() - self.Y) * (Z > 0)).T @ self.X / len(self.X)

    def risk(self, D: Tensor) -> float:
        """‖D - Δ‖²_F/2: small exactly where Δ is found."""
        return float((D - self.delta).square().sum() / 2)


@dataclass(frozen=True)
class TwoLayerProblem:
    """L(D) = mean cross-entropy of the logits σ(X·(W♮ + D)ᵀ)·Vᵀ, σ = ReLU; the head V is kept.

    weight: W♮ (out, in). head: V (classes, out). X (N, in). labels (N,).
    """

    weight: Tensor
    head: Tensor
    X: Tensor
    labels: Tensor

    def gradient(self, D: Tensor) -> Tensor:
        Z = self.X @ (self.weight + D).T
        surplus = (Z.relu() @ self.head.T).softmax(1) - one_hot(self.labels, len(self.head))
        return ((surplus @ self.head) * (Z > 0)).T @ self.X / len(self.X)

    def risk(self, D: Tensor) -> float:
        """The training loss."""
        return float(cross_entropy(self.logits(D), self.labels))

    def accuracy(self, D: Tensor) -> float:
        return float((self.logits(D).argmax(1) == self.labels).double().mean())

    def logits(self, D: Tensor) -> Tensor:
        return (self.X @ (self.weight + D).T).relu() @ self.head.T


def linear_problem(
    singular_values: Sequence[float], width: int, num_samples: int, generator: torch.Generator
) -> LinearProblem:
    """In = out = width, Δ with these singular values and random singular vectors."""
    delta = low_rank(singular_values, width, generator)
    X = gaussian((num_samples, width), generator)
    return LinearProblem(delta, X.T @ X / num_samples)


def relu_problem(
    singular_values: Sequence[float], width: int, num_samples: int, generator: torch.Generator
) -> ReluProblem:
    """As `linear_problem`; the rows of W♮ have norm 1, against which those of Δ are short."""
    delta = low_rank(singular_values, width, generator)
    weight = normalize(gaussian((width, width), generator))
    X = gaussian((num_samples, width), generator)
    return ReluProblem(weight, delta, X, (X @ (weight + delta).T).relu())


def spectrum(kappa: float) -> list[float]:
    """κ, 3, 2, 1, divided by κ: the singular values of Δ, of condition number κ."""
    return [value / kappa for value in (kappa, 3.0, 2.0, 1.0)]


def low_rank(singular_values: Sequence[float], width: int, generator: torch.Generator) -> Tensor:
    """P·diag(s)·Qᵀ (width, width) with random orthonormal P and Q."""
    s = torch.tensor(singular_values, dtype=FP64)
    P = torch.linalg.qr(gaussian((width, len(s)), generator)).Q
    Q = torch.linalg.qr(gaussian((width, len(s)), generator)).Q
    delta: Tensor = (P * s) @ Q.T
    return delta


def gaussian(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=FP64)


def sine(P: Tensor, Q: Tensor) -> float:
    """‖(I - QQᵀ)P‖₂, the sine of the largest principal angle, for orthonormal columns P (n, k) and Q (n, k)."""
    return float(torch.linalg.matrix_norm(P - Q @ (Q.T @ P), 2))
