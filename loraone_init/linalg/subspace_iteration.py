"""Subspace iteration for the leading singular triplets of several matrices of equal shape at once.

Each matrix has its own end: its triplets have converged, rounding keeps them from it, or the iterations are used up. It
then leaves the batch.

Of a batch on a GPU, torch.linalg.qr forms one Q after the other (pytorch/pytorch#143281). So batches are
orthonormalised by Cholesky factors of Gram matrices in fp64, twice (Yamamoto et al. 2015, "CholeskyQR2"), which is as
accurate unless columns are nearly dependent. That is seen, and the step is done again with torch.linalg.qr.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .ritz import MARGIN, MIN_GAP, ROUNDING, ZERO, Triplets

_EPS32 = torch.finfo(torch.float32).eps
_EXCESS = 1e-5  # how far ‖G - USVh‖_F may lie above the optimum, relatively
_MIN_PIVOT = 1e-6  # of columns of length 1: the first Q is then orthonormal up to q·ε64/1e-12, and the second in full

QR = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass
class Run:
    """How far one matrix has come.

    P: what the next step starts from (m, q).
    """

    norm: float
    P: Tensor
    triplets: Triplets | None = None
    iterations: int = 0
    largest_residual: float = 0.0
    at_rounding: bool = False  # of the present precision

    def advance(self, t: Triplets, P: Tensor, eps: float, tolerance: float) -> None:
        """Take in what a step has given."""
        self.iterations, self.P = self.iterations + 1, P
        if _converged(t, self.norm, eps, tolerance, self.largest_residual):
            self.triplets = t
        self.largest_residual = max(t.e[: t.r])
        self.at_rounding = self.largest_residual <= MARGIN * t.rounding

    def goes_on(self, budget: int) -> bool:
        return self.triplets is None and self.iterations < budget and not self.at_rounding


def iterate(G: Tensor, P: Tensor, r: int, norms: Sequence[float], tolerance: float, budget: int) -> list[Run]:
    """For each matrix of G (n, m, k), converged triplets, or None after `budget` iterations or where rounding prevents
    them; and the iterations done.

    Starts from P = G·Ω (n, m, q) in G's dtype; where that dtype's rounding is in the way, goes on in fp64 from the same
    subspace, with as many matrices at once as take no more memory than G.
    """
    eps = torch.finfo(G.dtype).eps
    runs = [Run(norm, start) for norm, start in zip(norms, P, strict=True)]
    for dtype in dict.fromkeys((G.dtype, torch.float64)):
        waiting = [i for i, run in enumerate(runs) if run.triplets is None]
        at_once = max(1, len(G) * G.dtype.itemsize // dtype.itemsize)
        for start in range(0, len(waiting), at_once):
            some = {i: runs[i] for i in waiting[start : start + at_once]}
            for run in some.values():
                run.at_rounding = False
            _iterate_in(dtype, G, some, r, eps, tolerance, budget)
    return runs


def _iterate_in(
    dtype: torch.dtype, G: Tensor, runs: dict[int, Run], r: int, eps: float, tolerance: float, budget: int
) -> None:
    """Advance the runs, by number of their matrix in G, in this precision until none of them goes on."""
    qr = cholesky_qr if len(runs) > 1 else householder_qr
    inside: list[int] = []
    A = P = G
    while numbers := [i for i, run in runs.items() if run.goes_on(budget)]:
        if numbers != inside:  # some have left
            inside, A = numbers, G  # what was held goes before the next is made
            A = (G if len(numbers) == len(G) else G[numbers]).to(dtype)
            P = torch.stack([runs[i].P for i in numbers]).to(dtype)
        stepped = step(A, P, r, qr)
        if stepped is None:
            qr = householder_qr
            continue
        triplets, P = stepped
        for i, t, next_P in zip(numbers, triplets, P, strict=True):
            runs[i].advance(t, next_P, eps, tolerance)


def step(G: Tensor, P: Tensor, r: int, qr: QR) -> tuple[list[Triplets], Tensor] | None:
    """Rayleigh-Ritz triplets of QᵀG, Q (n, m, q) orthonormal bases of P's columns; and the next P = G·Z. None where
    this way of orthonormalising does not do.

    QᵀG = RᵀZᵀ, so its SVD leaves GᵀU - V·S = 0 up to rounding, and G·V - U·S follows from the next P. The host waits
    once, besides what the SVD of R (n, q, q) needs on a GPU.
    """
    Q, _, sound = qr(P)
    Z, R, sound_too = qr(G.mT @ Q)
    U, S, Vh = torch.linalg.svd(R.mT)
    P = G @ Z
    U, Vh = Q @ U[:, :, : r + 1], Vh[:, : r + 1]
    E = P @ Vh.mT - U * S[:, None, : r + 1]
    V = Vh[:, :r] @ Z.mT
    told = torch.cat([S, torch.linalg.vector_norm(E, dim=1), (sound & sound_too).to(S)[:, None]], dim=1)
    triplets = []
    for i, (*host, is_sound) in enumerate(told.tolist()):
        if not is_sound:
            return None
        rounding = ROUNDING * torch.finfo(G.dtype).eps * host[0]
        triplets.append(Triplets(host[: S.shape[1]], host[S.shape[1] :], rounding, U[i, :, :r], V[i]))
    return triplets, P


def householder_qr(P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q (n, m, q) with orthonormal columns and R with P = Q·R; and that they are sound (n,), whatever P."""
    Q, R = torch.linalg.qr(P)
    return Q, R, torch.ones(len(P), dtype=torch.bool, device=P.device)


def cholesky_qr(P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same from Cholesky factors of the columns' Gram matrices; and whether they are sound (n,).

    Lengths come out first, so that only directions close to each other do harm. Where they do, Q and R mean nothing.
    """
    identity = torch.eye(P.shape[2], dtype=torch.float64, device=P.device)
    lengths = torch.linalg.vector_norm(P, dim=1, keepdim=True, dtype=torch.float64)
    sound = (lengths > 0.0).flatten(1).all(1)
    lengths = torch.where(lengths > 0.0, lengths, 1.0)
    Q, R = P / lengths, lengths.mT * identity
    for _ in range(2):
        L, failed = torch.linalg.cholesky_ex(Q.mT @ Q)
        sound &= (failed == 0) & (L.diagonal(dim1=1, dim2=2).amin(1) > _MIN_PIVOT)
        L = torch.where(sound[:, None, None], L, identity)
        Q, R = torch.linalg.solve_triangular(L.mT, Q, upper=True, left=False), L.mT @ R
    return Q.to(P), R.to(P), sound


def _converged(t: Triplets, norm: float, eps: float, tolerance: float, previous: float) -> bool:
    """Whether the reconstruction is optimal, and the subspaces are right or surely undefined.

    The latter only while the largest residual falls below the previous one or is negligible: it grows while a direction
    just above a flat spectrum is being found.
    """
    optimum = max(math.hypot(*t.s[t.r :]) ** 2, norm**2 - math.hypot(*t.s[: t.r]) ** 2 - t.rounding * norm)
    if MARGIN * t.excess() > _EXCESS * optimum + (ZERO / 2 * _EPS32 * norm) ** 2:
        return False
    last, largest = t.s[t.r - 1], max(t.e[: t.r])
    unsure = MARGIN * largest + t.rounding  # so far may σ_r lie above s_r
    undefined = last + unsure <= ZERO * eps * norm or t.gap + unsure / last < MIN_GAP
    return t.sine(eps) <= tolerance or (undefined and largest <= max(previous, 1e-3 * MIN_GAP * last))
