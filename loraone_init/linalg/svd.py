"""Truncated SVD of a gradient matrix that measures how accurate it is.

Randomized subspace iteration (Halko, Martinsson, Tropp 2011, arXiv 0909.4061, algorithm 4.4), orthonormalised at every
half step. No fixed number of iterations suits every gradient: a reconstruction within 0.1 % of the best can rest on
singular vectors off by a sine of 0.3. So it runs until its own residuals G·v - σ·u show that the reconstruction is
optimal and the singular subspaces are right (Wedin 1972): in fp32 first, on in fp64 where fp32 rounding is in the way,
and an exact SVD in fp64 where that is cheaper or the iterations are used up. Equal shapes are not batched: measured on
CPU, a batch of two costs exactly twice one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..errors import ConfigError, NumericalError
from .precision import full_precision
from .ritz import MARGIN, MIN_GAP, RitzValues, Triplets

Method = Literal["exact", "randomized"]

_EPS32 = torch.finfo(torch.float32).eps
_ZERO = 10.0  # singular values up to 10·ε·‖G‖_F are rounding, not signal
_EXCESS = 1e-5  # how far ‖G - USVh‖_F may lie above the optimum, relatively
_ROUNDING = 10.0  # rounding moves G·v - σ·u and Gᵀ·u - σ·v by up to 10·ε·σ_1 out of the subspace; seen: 9, r to 256
_MIN_BUDGET = 16  # iterations that must cost less than one exact SVD for iterating to be worth it
_BLOCK_ELEMENTS = 2**16  # fp64 entries in flight when the final residual is computed: they stay in the cache


@dataclass(frozen=True, kw_only=True)
class TruncatedSVD:
    """G ≈ U·diag(S)·Vh and what was measured about it. fp32, fp64 for fp64 input.

    The residual is at most (1 + 1e-5) times that of the best approximation of rank r, plus 10·ε32·‖G‖_F. The sine
    is an upper estimate for the largest principal angle between the singular subspaces found and the true ones of
    dimension r, the larger of left and right; None where these are undefined: gap < MIN_GAP, or `rank` < r.
    """

    U: Tensor  # (m, r) orthonormal, the entry of largest magnitude in every column is positive
    S: Tensor  # (r,) descending
    Vh: Tensor  # (r, n) orthonormal
    rank: int  # the numerical rank, at most r: so many of S exceed 10·ε·‖G‖_F, the others are rounding
    norm: float  # ‖G‖_F
    captured_energy: float  # 1 - residual²/norm²; 1 for G = 0
    residual: float  # ‖G - U·diag(S)·Vh‖_F of the tensors returned, computed in fp64
    sine: float | None
    method: Method  # "exact" if it comes from a full SVD in fp64
    iterations: int  # in both precisions, also those before an exact SVD took over
    ritz: RitzValues  # of G scaled by some power of two

    def first(self, rank: int) -> TruncatedSVD:
        """The best approximation of a smaller rank, and how accurate it is: what is left of U, S, Vh is the same."""
        if rank == len(self.S):
            return self
        ritz = self.ritz.first(rank)
        residual = math.hypot(self.residual, float(torch.linalg.vector_norm(self.S[rank:], dtype=torch.float64)))
        return replace(
            self,
            U=self.U[:, :rank],
            S=self.S[:rank],
            Vh=self.Vh[:rank],
            rank=min(self.rank, rank),
            captured_energy=1.0 - (residual / self.norm) ** 2 if self.norm else 1.0,
            residual=residual,
            sine=ritz.defined_sine(min(self.rank, rank), torch.finfo(self.S.dtype).eps),
            ritz=ritz,
        )

    def on_host(self) -> TruncatedSVD:
        """With its tensors in host memory."""
        return replace(self, U=self.U.cpu(), S=self.S.cpu(), Vh=self.Vh.cpu())


def truncated_svd(
    G: Tensor,
    rank: int,
    *,
    generator: torch.Generator,
    oversample: int = 16,
    tolerance: float = 1e-3,
    max_iterations: int | None = None,
) -> TruncatedSVD:
    """U·diag(S)·Vh, the best approximation of G (m, n) of the given rank, with `sine` at most `tolerance`.

    G:              any floating dtype, worked on in fp32 at least; any scale; not changed.
    generator:      draws the test matrix Ω (n, rank + oversample) on the generator's own device.
    oversample:     at least 1; fewer than 8 risk missing a singular value close to σ_r.
    tolerance:      below about 1e-5 vectors in fp32 cannot meet it.
    max_iterations: the exact SVD takes over after so many; by default once they have cost as much as it does.

    Raises ConfigError for an impossible matrix, rank or oversample, NumericalError if G is not finite.
    """
    _check_arguments(G, rank, oversample)
    with torch.no_grad(), full_precision(G.device):
        G, scale = _normalise(G.to(torch.float64 if G.dtype == torch.float64 else torch.float32))
        if scale == 0.0:
            U, Vh = (G.new_zeros(shape).fill_diagonal_(1.0) for shape in ((len(G), rank), (rank, G.shape[1])))
            zeros = RitzValues([0.0] * (rank + 1), [0.0] * (rank + 1), 0.0)
            return TruncatedSVD(
                U=U,
                S=G.new_zeros(rank),
                Vh=Vh,
                rank=0,
                norm=0.0,
                captured_energy=1.0,
                residual=0.0,
                sine=None,
                method="exact",
                iterations=0,
                ritz=zeros,
            )
        norm = float(torch.linalg.vector_norm(G, dtype=torch.float64))
        q = rank + oversample
        triplets, iterations = None, 0
        if budget := _iteration_budget(min(G.shape), q, max_iterations):
            Omega = torch.randn(G.shape[1], q, generator=generator, device=generator.device).to(G)
            triplets, iterations = _iterate(G, G @ Omega, rank, norm, tolerance, budget)
        method: Method = "randomized" if triplets else "exact"
        if triplets is None:
            triplets = _exact(G.cpu() if budget else G, rank)  # a matrix worth iterating is too large for the device
        return _result(G, triplets, norm, scale, method, iterations)


def svd_bytes(shape: tuple[int, int], rank: int, itemsize: int, oversample: int = 16) -> int:
    """About what `truncated_svd` takes beside G: a copy, and the exact SVD's fp64 where that is cheaper from the start.

    LAPACK's work included, that is 16 times an fp32 matrix that is square. Where iterations were used up, the exact SVD
    takes as much in host memory.
    """
    m, n = shape
    k, q = min(shape), rank + oversample
    exact = _iteration_budget(k, q, None) == 0
    work = 8 * (2 * m * n + k * (m + n) + 4 * k * k) if exact else 4 * itemsize * q * (m + n)
    return itemsize * m * n + work


def _iterate(G: Tensor, P: Tensor, r: int, norm: float, tolerance: float, budget: int) -> tuple[Triplets | None, int]:
    """Converged triplets, or None after `budget` iterations or where rounding prevents them; and the iterations done.

    Starts from P = G·Ω in G's dtype; where that dtype's rounding is in the way, goes on in fp64 from the same subspace.
    """
    iterations, previous, eps = 0, 0.0, torch.finfo(G.dtype).eps
    for dtype in dict.fromkeys((G.dtype, torch.float64)):
        A, P = G.to(dtype), P.to(dtype)
        while iterations < budget:
            triplets, P = _step(A, P, r)
            iterations += 1
            if _converged(triplets, norm, eps, tolerance, previous):
                return triplets, iterations
            previous = max(triplets.e[:r])
            if previous <= MARGIN * triplets.rounding:
                break
    return None, iterations


def _step(G: Tensor, P: Tensor, r: int) -> tuple[Triplets, Tensor]:
    """Rayleigh-Ritz triplets of QᵀG, Q (m, q) an orthonormal basis of P's columns; and the next P = G·Z.

    QᵀG = RᵀZᵀ, so its SVD leaves GᵀU - V·S = 0 up to rounding, and G·V - U·S follows from the next P. The host waits
    once, besides what the SVD of R (q, q) needs on a GPU.
    """
    Q = torch.linalg.qr(P).Q
    Z, R = torch.linalg.qr(G.T @ Q)
    U, S, Vh = torch.linalg.svd(R.T)
    P = G @ Z
    U, Vh = Q @ U[:, : r + 1], Vh[: r + 1]
    E = P @ Vh.T - U * S[: r + 1]
    host: list[float] = torch.cat([S, torch.linalg.vector_norm(E, dim=0)]).tolist()
    rounding = _ROUNDING * torch.finfo(G.dtype).eps * host[0]
    return Triplets(host[: len(S)], host[len(S) :], rounding, U[:, :r], Vh[:r] @ Z.T), P


def _converged(t: Triplets, norm: float, eps: float, tolerance: float, previous: float) -> bool:
    """Whether the reconstruction is optimal, and the subspaces are right or surely undefined.

    The latter only while the largest residual falls below the previous one or is negligible: it grows while a direction
    just above a flat spectrum is being found.
    """
    optimum = max(math.hypot(*t.s[t.r :]) ** 2, norm**2 - math.hypot(*t.s[: t.r]) ** 2 - t.rounding * norm)
    if MARGIN * t.excess() > _EXCESS * optimum + (_ZERO / 2 * _EPS32 * norm) ** 2:
        return False
    last, largest = t.s[t.r - 1], max(t.e[: t.r])
    unsure = MARGIN * largest + t.rounding  # so far may σ_r lie above s_r
    undefined = last + unsure <= _ZERO * eps * norm or t.gap + unsure / last < MIN_GAP
    return t.sine(eps) <= tolerance or (undefined and largest <= max(previous, 1e-3 * MIN_GAP * last))


def _exact(G: Tensor, r: int) -> Triplets:
    """Triplets of G (m, n) from a full SVD in fp64, whose rounding was seen to be larger: up to 45·ε·σ_1 at 120×120."""
    U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    s: list[float] = [*S.tolist(), 0.0]
    rounding = _ROUNDING * math.sqrt(len(S)) * torch.finfo(torch.float64).eps * s[0]
    return Triplets(s, [0.0] * (r + 1), rounding, U[:, :r], Vh[:r])


def _result(G: Tensor, t: Triplets, norm: float, scale: float, method: Method, iterations: int) -> TruncatedSVD:
    """Triplets of the normalised G (m, n) in its dtype, signs fixed, S and norms scaled back."""
    eps = torch.finfo(G.dtype).eps
    U, Vh = t.U.to(G), t.Vh.to(G)
    sign = U.gather(0, U.abs().argmax(dim=0, keepdim=True)).sign()
    U, Vh = U * sign, Vh * sign.T
    rank = sum(s > _ZERO * eps * norm for s in t.s[: t.r])
    S = torch.tensor(t.s[: t.r], dtype=G.dtype, device=G.device)
    residual = _residual(G, U, S, Vh)
    return TruncatedSVD(
        U=U,
        S=S * scale,
        Vh=Vh,
        rank=rank,
        norm=norm * scale,
        captured_energy=1.0 - (residual / norm) ** 2,
        residual=residual * scale,
        sine=t.defined_sine(rank, eps),
        method=method,
        iterations=iterations,
        ritz=t.first(t.r),
    )


def _residual(G: Tensor, U: Tensor, S: Tensor, Vh: Tensor) -> float:
    """‖G - U·diag(S)·Vh‖_F in fp64, G (m, n) by blocks of rows."""
    rows = max(1, _BLOCK_ELEMENTS // G.shape[1])
    U, SVh = U.double(), S.double()[:, None] * Vh.double()
    blocks = [
        torch.linalg.vector_norm(torch.addmm(G[i : i + rows].double(), U[i : i + rows], SVh, alpha=-1))
        for i in range(0, len(G), rows)
    ]
    return float(torch.linalg.vector_norm(torch.stack(blocks)))


def _normalise(G: Tensor) -> tuple[Tensor, float]:
    """G/scale with its largest entry near 1, so that no square underflows; scale = 0 for G = 0.

    The scale is a power of two, which makes this exact: any other would round G and turn its subspaces.
    """
    peak = max(abs(float(extreme)) for extreme in G.aminmax())
    if not math.isfinite(peak):
        raise NumericalError("not finite: the matrix has NaN or infinite entries")
    limit = 126 if G.dtype == torch.float32 else 1022  # 2^-limit is still a normal number
    exponent = max(-limit, min(limit, math.frexp(peak)[1]))
    return (G * 2.0**-exponent, 2.0**exponent) if peak > 0.0 else (G, 0.0)


def _iteration_budget(size: int, q: int, max_iterations: int | None) -> int:
    """How many iterations with q vectors to allow for min(m, n) = size; 0 for the exact SVD at once.

    One exact fp64 SVD costs as much as 2.3·(size/q)^1.2 fp32 iterations: measured on 2 cores, 192×576 to 2048×1024, q
    17 to 272, within a third. Allowing as many costs at most about twice the cheaper of both.
    """
    affordable = int(2.3 * (size / q) ** 1.2)
    wanted = affordable if max_iterations is None else max_iterations
    return wanted if affordable >= _MIN_BUDGET else 0


def _check_arguments(G: Tensor, rank: int, oversample: int) -> None:
    if G.ndim != 2 or not G.is_floating_point():
        raise ConfigError(f"the SVD needs a floating-point matrix, got {G.dtype} of shape {tuple(G.shape)}")
    if not 1 <= rank <= min(G.shape):
        raise ConfigError(f"rank must be 1 to {min(G.shape)} for a matrix of shape {tuple(G.shape)}, got {rank}")
    if oversample < 1:
        raise ConfigError(f"oversample must be at least 1, got {oversample}")
