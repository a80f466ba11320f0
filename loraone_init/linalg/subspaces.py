"""How far apart two subspaces are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .layer_gradient import LayerGradient
from .seeding import layer_generator
from .svd import TruncatedSVD, truncated_svds

SUBSPACE_SINE = 1e-2
"""How accurate the halves' subspaces are: it moves a cos² by 1e-4 at most, and sampling moves it by far more."""


def principal_angles(X: torch.Tensor, Y: torch.Tensor) -> tuple[float, ...]:
    """Principal angles in degrees, ascending, between the column spans of X (n, p) and Y (n, q): min(p, q) of them.

    Small ones from their sines, large ones from their cosines, so that neither loses digits (Björck and Golub 1973).
    Columns that are zero or dependent span nothing: each takes an angle of 90° with it.
    """
    Q1, Q2 = _basis(X), _basis(Y)
    if Q1.shape[1] < Q2.shape[1]:
        Q1, Q2 = Q2, Q1
    cosines = torch.linalg.svdvals(Q1.T @ Q2).clamp(max=1.0)
    sines = torch.linalg.svdvals(Q2 - Q1 @ (Q1.T @ Q2)).clamp(max=1.0).flip(0)
    angles = torch.where(cosines**2 > 0.5, sines.asin(), cosines.acos()).rad2deg()
    missing = min(X.shape[1], Y.shape[1]) - len(angles)
    return (*angles.tolist(), *[90.0] * missing)


def _basis(X: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns that span what the columns of X (n, p) span, up to rounding."""
    U, S, _ = torch.linalg.svd(X, full_matrices=False)
    num_kept = int((S.amax() * max(X.shape) * torch.finfo(torch.float32).eps < S).sum())
    basis: torch.Tensor = U[:, :num_kept]
    return basis


def split_half_agreements(gradients: Sequence[LayerGradient], rank: int, seed: int) -> list[tuple[float, float] | None]:
    """‖U₁ᵀU₂‖²_F/r and ‖V₁ᵀV₂‖²_F/r of the leading r singular vectors of what both halves give of a gradient (out, in),
    for several gradients that are alike, in one batch.

    That is the mean cos² of the r principal angles on either side: the share of one subspace that lies in the other,
    from r/out (r/in) for subspaces that have nothing to do with each other to 1 for the same. It changes smoothly where
    single angles jump: the last one belongs to whatever direction is next to be found.
    None where one of the halves has a numerical rank below r, so that its subspace is not defined.
    """
    generators = [layer_generator(seed, f"{gradient.name}, in halves") for gradient in gradients]
    ones, twos = (
        truncated_svds(
            [gradient.parts[half] for gradient in gradients],
            rank,
            generators=generators,
            tolerance=SUBSPACE_SINE,
            device=torch.device("cpu"),
        )
        for half in (0, 1)
    )
    return [_agreement(one, two, rank) for one, two in zip(ones, twos, strict=True)]


def _agreement(one: TruncatedSVD, two: TruncatedSVD, rank: int) -> tuple[float, float] | None:
    if min(one.rank, two.rank) < rank:
        return None
    output = one.U.double().T @ two.U.double()
    input_ = one.Vh.double() @ two.Vh.double().T
    return float(output.square().sum()) / rank, float(input_.square().sum()) / rank
