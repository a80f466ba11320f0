"""Truncated SVD of a gradient matrix that measures how accurate it is.

Randomized subspace iteration (Halko, Martinsson, Tropp 2011, arXiv 0909.4061, algorithm 4.4), orthonormalised at every
half step. No fixed number of iterations suits every gradient: a reconstruction within 0.1 % of the best can rest on
singular vectors that are off by a sine of 0.3. So it runs until its own residuals G·v - σ·u show that the reconstruction
is optimal and the singular subspaces are right (Wedin 1972): in fp32 first, on in fp64 where fp32 rounding is in the
way, and an exact SVD in fp64 where that is cheaper or the iterations are used up.

Equal shapes are not batched: measured on CPU, a batch of two costs exactly twice one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .errors import ConfigError, NumericalError

MIN_GAP = 0.01
"""Relative gap (σ_r - σ_{r+1})/σ_r below which the rank-r singular subspaces count as undefined."""

_EPS32 = torch.finfo(torch.float32).eps
_ZERO = 10.0  # singular values up to 10·ε·‖G‖_F are rounding, not signal
_EXCESS = 1e-5  # how far ‖G - USVh‖_F may lie above the optimum, relatively
_MARGIN = 4.0  # safety factor on residuals that stand in for unknown errors
_ROUNDING = 10.0  # G·v - σ·u and Gᵀ·u - σ·v are off by up to 10·ε·σ_1 outside the subspace; seen: 9, r up to 256
_MIN_BUDGET = 16  # iterations that must cost less than one exact SVD for iterating to be worth it
_BLOCK_ELEMENTS = 2**22  # fp64 entries in flight when the final residual is computed (32 MiB)


@dataclass(frozen=True)
class TruncatedSVD:
    """G ≈ U·diag(S)·Vh with orthonormal U, Vh, S descending, and what was measured about it.

    U (m, r), S (r,), Vh (r, n): fp32, or fp64 for fp64 input, on G's device. The entry of largest magnitude in every
                     column of U is positive.
    rank:            how many of the r singular values exceed 10·ε·‖G‖_F, ε of the returned dtype. Beyond it S is exactly 0,
                     and the vectors are orthonormal but arbitrary.
    norm:            ‖G‖_F.
    captured_energy: 1 - residual²/norm²; 1 for G = 0.
    residual:        ‖G - U·diag(S)·Vh‖_F in fp64, from the tensors returned. At most (1 + 1e-5) times that of the best
                     approximation of rank `rank`, plus 10·ε32·‖G‖_F.
    sine:            upper estimate of the sine of the largest principal angle to the true rank-r singular subspaces, the
                     larger of left and right; None where these are undefined: gap below MIN_GAP, or `rank` < r.
    method:          "randomized", or "exact" if the result comes from an exact SVD in fp64.
    iterations:      subspace iterations done, in either precision, and also if the result is exact after all.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    rank: int
    norm: float
    captured_energy: float
    residual: float
    sine: float | None
    method: Literal["exact", "randomized"]
    iterations: int


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

    G:              finite, any floating dtype; not changed. Worked on in fp32 at least, at any scale.
    generator:      draws the test matrix Ω (n, rank + oversample), in fp32 on the generator's own device.
    oversample:     columns of Ω beyond the rank, at least 1: σ_{r+1} is read off the first.
    tolerance:      bound on the sine where the subspaces are defined; below about 1e-5 fp32 vectors cannot meet it.
    max_iterations: after so many the exact SVD takes over; by default once they cost as much as it does.

    Raises ConfigError for an impossible matrix, rank or oversample, NumericalError if G is not finite.
    """
    _check_arguments(G, rank, oversample)
    with torch.no_grad(), _full_precision(G.device):
        G, scale = _normalise(G.to(torch.float64 if G.dtype == torch.float64 else torch.float32))
        if scale == 0.0:
            return _zero(G, rank)
        norm = float(torch.linalg.vector_norm(G, dtype=torch.float64))
        eps = torch.finfo(G.dtype).eps
        goal = _Goal(norm, zero=_ZERO * eps * norm, floor=_MARGIN * eps * math.sqrt(rank), sine=tolerance)
        q = rank + oversample
        budget = _iteration_budget(min(G.shape), q, max_iterations)
        triplets, iterations = None, 0
        if budget:
            Omega = torch.randn(G.shape[1], q, generator=generator, device=generator.device).to(G)
            triplets, iterations = _subspace_iteration(G, Omega, rank, goal, budget)
        if triplets is None:
            return _result(G, _exact(G, rank), goal, scale, "exact", iterations)
        return _result(G, triplets, goal, scale, "randomized", iterations)


def layer_generator(seed: int, name: str) -> torch.Generator:
    """CPU generator seeded by sha256 of seed and layer name: its numbers do not depend on layer order or device."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))  # the Mersenne twister takes 32 bits


@dataclass(frozen=True)
class _Goal:
    """What a result for the normalised G has to reach.

    norm:  ‖G‖_F.
    zero:  singular values up to here count as zero.
    floor: sine that rounding the vectors to the returned dtype can cost.
    sine:  the caller's tolerance.
    """

    norm: float
    zero: float
    floor: float
    sine: float

    def met_by(self, t: _Triplets) -> bool:
        """Whether the reconstruction is optimal, and the subspaces are right or surely undefined."""
        optimum = max(sum(s * s for s in t.s[t.r :]), self.norm**2 - t.energy - t.rounding * self.norm)
        if _MARGIN * t.excess > _EXCESS * optimum + (_ZERO / 2 * _EPS32 * self.norm) ** 2:
            return False
        unsure = _MARGIN * max(t.e[: t.r]) + t.rounding  # σ_r may lie this far above s_r
        deficient = t.s[t.r - 1] + unsure <= self.zero
        return deficient or t.gap + unsure / t.s[t.r - 1] < MIN_GAP or t.sine + self.floor <= self.sine


@dataclass(frozen=True)
class _Triplets:
    """Approximate singular triplets u_i, s_i, v_i of G with Gᵀu_i = s_i·v_i, and their residuals, on the host.

    U (m, r), Vh (r, n).
    s: q >= r singular values (Ritz values) s_i <= σ_i, descending.
    e: r + 1 residual norms ‖G·v_i - s_i·u_i‖, i = 1..r+1.
    rounding: what e and s may be off by.
    """

    U: Tensor
    Vh: Tensor
    s: list[float]
    e: list[float]
    rounding: float

    @property
    def r(self) -> int:
        return self.U.shape[1]

    @property
    def next(self) -> float:
        """s_{r+1}, the estimate of σ_{r+1}; 0 where the matrix has no more than r."""
        return self.s[self.r] if self.r < len(self.s) else 0.0

    @property
    def gap(self) -> float:
        """(s_r - s_{r+1})/s_r, 0 for s_r = 0."""
        last = self.s[self.r - 1]
        return (last - self.next) / last if last > 0 else 0.0

    @property
    def energy(self) -> float:
        """Σ s_i², i <= r."""
        return sum(s * s for s in self.s[: self.r])

    @property
    def excess(self) -> float:
        """About Σ σ_i² - Σ s_i², i <= r: how far ‖G - USVh‖²_F lies above its minimum.

        V captures ‖G·V‖² = Σ s_i² + Σ e_i², so Σ e_i² is what the next half step gains at least; later ones gain by the
        factor (σ_{q+1}/σ_r)² less each. Here s_q stands for σ_{q+1}.
        """
        decay = (self.s[-1] / self.s[self.r - 1]) ** 2 if self.s[self.r - 1] > 0 else 0.0
        return sum(e * e for e in self.e[: self.r]) / max(1.0 - decay, 1e-3)

    @property
    def sine(self) -> float:
        """Upper estimate of the sine between the spans of U, V and the true ones, before they are rounded.

        Wedin 1972, in the form for single vectors: multiplying G·v_i - s_i·u_i and Gᵀ·u_i - s_i·v_i by the true singular
        vectors beyond r leaves of u_i and v_i outside the true subspaces at most e_i/(s_i - σ_{r+1}). Per vector, so that
        rounding at the height of σ_1 is not divided by the gap at σ_r. σ_{r+1} is taken as s_{r+1} + e_{r+1}.
        """
        sigma_next = self.next + self.e[self.r] + self.rounding if self.next > 0 else 0.0
        if self.s[self.r - 1] - self.rounding <= sigma_next:
            return 1.0
        outside = ((e + self.rounding) / (s - self.rounding - sigma_next) for s, e in zip(self.s, self.e[: self.r]))
        return min(1.0, math.sqrt(sum(x * x for x in outside)))


def _subspace_iteration(
    G: Tensor, Omega: Tensor, r: int, goal: _Goal, max_iterations: int
) -> tuple[_Triplets | None, int]:
    """The triplets that meet the goal, None if none does; and the iterations done.

    In G's own precision, then, where rounding keeps the goal out of reach, from the same subspace on in fp64.
    """
    iterations = 0
    P = G @ Omega
    for A in (G, G.double()):
        P = P.to(A.dtype)
        while iterations < max_iterations:
            triplets, P = _iterate(A, P, r)
            iterations += 1
            if goal.met_by(triplets):
                return triplets, iterations
            if max(triplets.e[:r]) <= _MARGIN * triplets.rounding:
                break
    return None, iterations


def _iterate(G: Tensor, P: Tensor, r: int) -> tuple[_Triplets, Tensor]:
    """Rayleigh-Ritz triplets of QᵀG, Q (m, q) an orthonormal basis of P's columns; and the next P = G·GᵀQ·R⁻¹.

    QᵀG = RᵀZᵀ and its SVD give GᵀU = V·S up to rounding, so G·V - U·S is the only residual, and G·V comes with the next
    P = G·Z. On a GPU the host waits once for the residuals (besides what the SVD of R, (q, q), waits by itself).
    """
    Q = torch.linalg.qr(P).Q
    Z, R = torch.linalg.qr(G.T @ Q)
    U, S, Vh = torch.linalg.svd(R.T)
    P = G @ Z
    U, Vh = Q @ U[:, : r + 1], Vh[: r + 1]
    e = torch.linalg.vector_norm(P @ Vh.T - U * S[: r + 1], dim=0)
    host: list[float] = torch.cat([S, e]).tolist()
    s, rounding = host[: len(S)], _ROUNDING * torch.finfo(G.dtype).eps * host[0]
    return _Triplets(U[:, :r], Vh[:r] @ Z.T, s, host[len(S) :], rounding), P


def _exact(G: Tensor, r: int) -> _Triplets:
    """Exact triplets of G (m, n) from a full SVD in fp64."""
    U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    s: list[float] = S.tolist()
    return _Triplets(U[:, :r], Vh[:r], s, [0.0] * (r + 1), _ROUNDING * torch.finfo(torch.float64).eps * s[0])


def _result(
    G: Tensor, t: _Triplets, goal: _Goal, scale: float, method: Literal["exact", "randomized"], iterations: int
) -> TruncatedSVD:
    """Triplets of the normalised G (m, n) in its dtype, signs fixed, S and norms scaled back."""
    U, Vh = t.U.to(G.dtype), t.Vh.to(G.dtype)
    sign = U.gather(0, U.abs().argmax(dim=0, keepdim=True)).sign()
    U, Vh = U * sign, Vh * sign.T
    rank = sum(s > goal.zero for s in t.s[: t.r])
    S = torch.tensor(t.s[:rank] + [0.0] * (t.r - rank), dtype=G.dtype, device=G.device)
    residual = _residual(G, U, S, Vh)
    defined = rank == t.r and t.gap >= MIN_GAP
    return TruncatedSVD(
        U=U,
        S=S * scale,
        Vh=Vh,
        rank=rank,
        norm=goal.norm * scale,
        captured_energy=1.0 - (residual / goal.norm) ** 2,
        residual=residual * scale,
        sine=min(1.0, t.sine + goal.floor) if defined else None,
        method=method,
        iterations=iterations,
    )


def _residual(G: Tensor, U: Tensor, S: Tensor, Vh: Tensor) -> float:
    """‖G - U·diag(S)·Vh‖_F in fp64, G (m, n) by blocks of rows."""
    rows = max(1, _BLOCK_ELEMENTS // G.shape[1])
    SVh = S.double()[:, None] * Vh.double()
    blocks = zip(G.split(rows), U.split(rows))
    return math.sqrt(float(sum((Gi.double() - Ui.double() @ SVh).square().sum() for Gi, Ui in blocks)))


def _normalise(G: Tensor) -> tuple[Tensor, float]:
    """G/scale with its largest entry near 1, so that no square underflows; scale = 0 for G = 0.

    The scale is a power of two, which makes this exact. Any other would round G and turn its subspaces.
    """
    peak = float(G.abs().amax())
    if not math.isfinite(peak):
        raise NumericalError("not finite: the matrix has NaN or infinite entries")
    if peak == 0.0:
        return G, 0.0
    limit = 126 if G.dtype == torch.float32 else 1022  # 2^-limit is still a normal number
    exponent = max(-limit, min(limit, math.frexp(peak)[1]))
    return G * 2.0**-exponent, 2.0**exponent


def _zero(G: Tensor, r: int) -> TruncatedSVD:
    """The result for G = 0 (m, n)."""
    m, n = G.shape
    U, Vh = G.new_zeros(m, r).fill_diagonal_(1.0), G.new_zeros(r, n).fill_diagonal_(1.0)
    return TruncatedSVD(U, G.new_zeros(r), Vh, 0, 0.0, 1.0, 0.0, None, "exact", 0)


def _iteration_budget(size: int, q: int, max_iterations: int | None) -> int:
    """How many iterations with q vectors to allow for a matrix with min(m, n) = size; 0 for exact at once.

    One exact fp64 SVD costs as much as 2.3·(size/q)^1.2 fp32 iterations: measured on 2 cores from 192×576 to 2048×1024,
    q = 17 to 272, within a third. Allowing as many costs at most about twice the cheaper of both.
    """
    affordable = int(2.3 * (size / q) ** 1.2)
    if affordable < _MIN_BUDGET:
        return 0
    return affordable if max_iterations is None else max_iterations


def _check_arguments(G: Tensor, rank: int, oversample: int) -> None:
    if G.ndim != 2 or not G.is_floating_point():
        raise ConfigError(f"the SVD needs a floating-point matrix, got {G.dtype} of shape {tuple(G.shape)}")
    if not 1 <= rank <= min(G.shape):
        raise ConfigError(f"rank must be 1 to {min(G.shape)} for a matrix of shape {tuple(G.shape)}, got {rank}")
    if oversample < 1:
        raise ConfigError(f"oversample must be at least 1, got {oversample}")


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products in the precision of their operands: TF32, its CPU counterpart and autocast are off inside."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before):
            backend.fp32_precision = precision
