"""Truncated SVD of gradient matrices that measures how accurate it is.

Randomized subspace iteration (Halko, Martinsson, Tropp 2011, arXiv 0909.4061, algorithm 4.4), orthonormalised at every
half step. No fixed number of iterations suits every gradient: a reconstruction within 0.1 % of the best can rest on
singular vectors off by a sine of 0.3. So it runs until its own residuals G·v - σ·u show that the reconstruction is
optimal and the singular subspaces are right (Wedin 1972): in fp32 first, on in fp64 where fp32 rounding is in the way
(see `subspace_iteration`), and an exact SVD in fp64 where that is cheaper or the iterations are used up.

Matrices of equal shape can be decomposed in one batch. On a GPU a matrix alone is mostly launches of small kernels and
waiting for them, which a batch shares. On a CPU, a batch of two costs twice one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..errors import ConfigError
from .matrix_batches import normalise, residual_norms
from .precision import full_precision
from .ritz import ROUNDING, ZERO, RitzValues, Triplets
from .subspace_iteration import iterate

Method = Literal["exact", "randomized"]

_MIN_BUDGET = 16  # iterations that must cost less than one exact SVD for iterating to be worth it


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
    (result,) = truncated_svds(
        [G],
        rank,
        generators=[generator],
        oversample=oversample,
        tolerance=tolerance,
        max_iterations=max_iterations,
    )
    return result


@torch.no_grad()
def truncated_svds(
    matrices: Sequence[Tensor],
    rank: int,
    *,
    generators: Sequence[torch.Generator],
    oversample: int = 16,
    tolerance: float = 1e-3,
    max_iterations: int | None = None,
    device: torch.device | None = None,
) -> list[TruncatedSVD]:
    """`truncated_svd` of several matrices of one shape, dtype and device in one batch, each with its own generator.

    What differs from one matrix at a time is rounding: S by a few ε·σ_1, vectors by as much as that moves them. The
    host waits for the device a fixed number of times for the batch and for each iteration of its slowest matrix, and
    once more for each matrix that the exact SVD takes over.

    device: where the tensors of the results are put; by default where the matrices are.

    Raises ConfigError also where the matrices are not alike.
    """
    _check_arguments(matrices, rank, oversample)
    first = matrices[0]
    with full_precision(first.device):
        G = (torch.stack(list(matrices)) if len(matrices) > 1 else first[None]).to(_working_dtype(first))
        G, scales = normalise(G)
        given = [i for i, scale in enumerate(scales) if scale > 0.0]
        results = {
            i: _of_zeros(first.shape, rank, G.dtype, device or G.device) for i, scale in enumerate(scales) if not scale
        }
        if given:
            G = G[given] if results else G
            norms: list[float] = torch.linalg.vector_norm(G.flatten(1), dim=1, dtype=torch.float64).tolist()
            chosen = [generators[i] for i in given]
            found = _decompose(G, rank, rank + oversample, norms, chosen, tolerance, max_iterations)
            results |= zip(given, _results(G, found, norms, [scales[i] for i in given], device), strict=True)
        return [results[i] for i in range(len(scales))]


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


@dataclass(frozen=True)
class _Found:
    """The triplets of one matrix, and how they were found."""

    triplets: Triplets
    method: Method
    iterations: int


def _decompose(
    G: Tensor,
    r: int,
    q: int,
    norms: Sequence[float],
    generators: Sequence[torch.Generator],
    tolerance: float,
    max_iterations: int | None,
) -> list[_Found]:
    """The triplets of each normalised matrix of G (n, m, k) != 0: the exact ones where iterating is not worth it."""
    budget = _iteration_budget(min(G.shape[1:]), q, max_iterations)
    if not budget:
        return [_Found(triplets, "exact", 0) for triplets in _exact(G, r)]
    draws = [torch.randn(G.shape[2], q, generator=generator, device=generator.device) for generator in generators]
    runs = iterate(G, G @ torch.stack(draws).to(G), r, norms, tolerance, budget)
    found = []
    for i, run in enumerate(runs):
        if run.triplets:
            found.append(_Found(run.triplets, "randomized", run.iterations))
        else:  # a matrix worth iterating is too large for the device
            (triplets,) = _exact(G[i].cpu()[None], r)
            found.append(_Found(triplets, "exact", run.iterations))
    return found


def _exact(G: Tensor, r: int) -> list[Triplets]:
    """Triplets of each matrix of G (n, m, k) from a full SVD in fp64, whose rounding was seen to be larger than that of
    an iteration: up to 45·ε·σ_1 at 120×120.
    """
    U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    factor = ROUNDING * math.sqrt(S.shape[1]) * torch.finfo(torch.float64).eps
    return [
        Triplets([*s, 0.0], [0.0] * (r + 1), factor * s[0], U[i, :, :r], Vh[i, :r]) for i, s in enumerate(S.tolist())
    ]


def _results(
    G: Tensor, found: Sequence[_Found], norms: Sequence[float], scales: Sequence[float], device: torch.device | None
) -> list[TruncatedSVD]:
    """Triplets of each normalised matrix of G (n, m, k) in its dtype, signs fixed, S and norms scaled back."""
    eps = torch.finfo(G.dtype).eps
    U, Vh = torch.stack([f.triplets.U.to(G) for f in found]), torch.stack([f.triplets.Vh.to(G) for f in found])
    sign = U.gather(1, U.abs().argmax(dim=1, keepdim=True)).sign()
    U, Vh = U * sign, Vh * sign.mT
    S = torch.tensor([f.triplets.s[: f.triplets.r] for f in found], dtype=G.dtype, device=G.device)
    residuals = residual_norms(G, U, S, Vh)
    U, Vh = U.to(device or G.device), Vh.to(device or G.device)
    results = []
    for i, (f, norm, scale, residual) in enumerate(zip(found, norms, scales, residuals, strict=True)):
        t = f.triplets
        rank = sum(s > ZERO * eps * norm for s in t.s[: t.r])
        results.append(
            TruncatedSVD(
                U=_alone(U, i),
                S=torch.tensor(t.s[: t.r], dtype=G.dtype, device=U.device) * scale,
                Vh=_alone(Vh, i),
                rank=rank,
                norm=norm * scale,
                captured_energy=1.0 - (residual / norm) ** 2,
                residual=residual * scale,
                sine=t.defined_sine(rank, eps),
                method=f.method,
                iterations=f.iterations,
                ritz=t.first(t.r),
            )
        )
    return results


def _alone(batch: Tensor, i: int) -> Tensor:
    """One of a batch, which does not keep the others in memory."""
    return batch[i].clone() if len(batch) > 1 else batch[0]


def _of_zeros(shape: torch.Size, rank: int, dtype: torch.dtype, device: torch.device) -> TruncatedSVD:
    """The SVD of a matrix of zeros."""
    m, n = shape
    U, Vh = (torch.eye(*size, dtype=dtype, device=device) for size in ((m, rank), (rank, n)))
    return TruncatedSVD(
        U=U,
        S=U.new_zeros(rank),
        Vh=Vh,
        rank=0,
        norm=0.0,
        captured_energy=1.0,
        residual=0.0,
        sine=None,
        method="exact",
        iterations=0,
        ritz=RitzValues([0.0] * (rank + 1), [0.0] * (rank + 1), 0.0),
    )


def _working_dtype(G: Tensor) -> torch.dtype:
    """What G is worked on in: fp32 at least."""
    return torch.float64 if G.dtype == torch.float64 else torch.float32


def _iteration_budget(size: int, q: int, max_iterations: int | None) -> int:
    """How many iterations with q vectors to allow for min(m, n) = size; 0 for the exact SVD at once.

    One exact fp64 SVD costs as much as 2.3·(size/q)^1.2 fp32 iterations: measured on 2 cores, 192×576 to 2048×1024, q
    17 to 272, within a third. Allowing as many costs at most about twice the cheaper of both.
    """
    affordable = int(2.3 * (size / q) ** 1.2)
    wanted = affordable if max_iterations is None else max_iterations
    return wanted if affordable >= _MIN_BUDGET else 0


def _check_arguments(matrices: Sequence[Tensor], rank: int, oversample: int) -> None:
    if len({(G.shape, G.dtype, G.device) for G in matrices}) != 1:
        described = ", ".join(f"{G.dtype} {tuple(G.shape)} on {G.device}" for G in matrices)
        raise ConfigError(f"SVDs in one batch need matrices of one shape, dtype and device, got {described or 'none'}")
    G = matrices[0]
    if G.ndim != 2 or not G.is_floating_point():
        raise ConfigError(f"the SVD needs a floating-point matrix, got {G.dtype} of shape {tuple(G.shape)}")
    if not 1 <= rank <= min(G.shape):
        raise ConfigError(f"rank must be 1 to {min(G.shape)} for a matrix of shape {tuple(G.shape)}, got {rank}")
    if oversample < 1:
        raise ConfigError(f"oversample must be at least 1, got {oversample}")
