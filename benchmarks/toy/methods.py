"""Starting points of LoRA and its variants, and gradient descent on the factors. D = B·A with s = 1.

LoRA-One's start and the preconditioner are the library's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from loraone_init.linalg.factors import LoraPair, spectral_init
from loraone_init.linalg.svd import truncated_svd
from loraone_init.optim.preconditioning import precondition

from .problems import LinearProblem, Problem, gaussian

_DIVERGED = 1e6  # no risk starts above 10


def lora(G: Tensor, rank: int, std: float, generator: torch.Generator) -> LoraPair:
    """A (r, in) ~ N(0, std²), B = 0 (out, r)."""
    return LoraPair(std * gaussian((rank, G.shape[1]), generator), G.new_zeros(len(G), rank))


def lora_one(G: Tensor, rank: int, generator: torch.Generator, *, step: float = 1.0) -> LoraPair:
    """B₀A₀ = -step·G_r: the library's start with γ = 1/(step·S[0]), which undoes its normalisation Ŝ = S/S[0]."""
    svd = truncated_svd(G, rank, generator=generator)
    gamma = 1.0 / (step * svd.S[0].item())
    return spectral_init(svd.U, svd.S, svd.Vh, gamma, generator, rank=svd.rank, dtype=G.dtype)


def lora_ga(problem: LinearProblem, rank: int, *, gamma: float = 16.0) -> tuple[LinearProblem, LoraPair]:
    """LoRA-GA (Wang et al. 2024, arXiv 2407.05000, Algorithm 1, "ArB2r"), with PEFT's default γ = 16, and s = 1.

    From G = U·diag(S)·Vᵀ: A₀ = out^¼·γ^(-½)·V[:, :r]ᵀ, B₀ = out^¼·γ^(-½)·U[:, r:2r], and W♮ is replaced by W♮ - B₀A₀,
    so that nothing is changed at the start. For the factors' product, the shift to be learnt becomes Δ + B₀A₀. Where
    rank(G) = r* <= r, as here, U[:, r:2r] and V[:, r*:r] are arbitrary directions that are orthogonal to G.
    PEFT's `lora_ga` also multiplies B₀ by S[r:2r], which would be zero here; the paper does not.
    """
    G = problem.gradient(torch.zeros_like(problem.delta))
    U, _, Vh = torch.linalg.svd(G)
    scale = len(G) ** 0.25 / gamma**0.5
    pair = LoraPair(scale * Vh[:rank], scale * U[:, rank : 2 * rank])
    return replace(problem, delta=problem.delta + pair.B @ pair.A), pair


def lora_sb(problem: Problem, G: Tensor, rank: int, learning_rate: float) -> Iterator[LoraPair]:
    """LoRA-SB (Ponkshe et al. 2024, arXiv 2411.19557): D = B·R·A, only R (r, r) is trained. Yields (A, B·R).

    From -G = U·diag(S)·Vᵀ: B = U[:, :r], R₀ = diag(S[:r]), A = V[:, :r]ᵀ, so B·R₀·A = -G_r, one step of gradient
    descent of length 1 where the authors take one of AdamW; s = 1. The gradient of R is BᵀGAᵀ. Preconditioned it is
    (BᵀB)⁻¹·BᵀGAᵀ·(AAᵀ)⁻¹, which is the same because B and A are orthonormal.
    """
    U, S, Vh = torch.linalg.svd(-G)
    B, R, A = U[:, :rank], torch.diag(S[:rank]), Vh[:rank]
    while True:
        yield LoraPair(A, B @ R)
        R = R - learning_rate * B.T @ problem.gradient(B @ R @ A) @ A.T


def descent(problem: Problem, pair: LoraPair, learning_rate: float, damping: float | None = None) -> Iterator[LoraPair]:
    """Yields A₀, B₀ and what each step of gradient descent on both makes of them: g_A = BᵀG, g_B = GAᵀ.

    damping: λ of the preconditioner; None for plain gradient descent.
    """
    A, B = pair.A, pair.B
    while True:
        yield LoraPair(A, B)
        G = problem.gradient(B @ A)
        grad_A, grad_B = B.T @ G, G @ A.T
        if damping is not None:
            grad_A, grad_B = precondition(A, B, grad_A, grad_B, damping, "absolute")
        A, B = A - learning_rate * grad_A, B - learning_rate * grad_B


def full_descent(problem: Problem, start: Tensor, learning_rate: float) -> Iterator[Tensor]:
    """Yields D₀ and what each step of full fine-tuning makes of it."""
    D = start
    while True:
        yield D
        D = D - learning_rate * problem.gradient(D)


def risks(problem: Problem, pairs: Iterable[LoraPair], steps: int) -> list[float]:
    """The risk before the first step and after each; infinite from where it diverges."""
    found: list[float] = []
    for pair in islice(pairs, steps + 1):
        risk = problem.risk(pair.B @ pair.A)
        if not risk < _DIVERGED:  # NaN neither
            break
        found.append(risk)
    return found + [math.inf] * (steps + 1 - len(found))
