"""Batches of matrices of equal shape: brought to a common scale, and held against their decompositions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import NumericalError

_BLOCK_ELEMENTS = 2**16  # fp64 entries in flight when the final residual is computed: they stay in the CPU's cache
_GPU_BLOCK_ELEMENTS = 2**22  # likewise on a GPU, where small blocks cost a launch each


def normalise(G: Tensor) -> tuple[Tensor, list[float]]:
    """Each matrix of G (n, m, k) over its scale, with its largest entry near 1, so that no square underflows; and the
    scales, 0 for a matrix of zeros.

    A scale is a power of two, which makes this exact: any other would round G and turn its subspaces.
    """
    entries = G.flatten(1)
    peaks: list[float] = torch.stack([entries.amin(1), entries.amax(1)]).abs().amax(0).tolist()
    if not all(map(math.isfinite, peaks)):
        raise NumericalError("not finite: the matrix has NaN or infinite entries")
    limit = 126 if G.dtype == torch.float32 else 1022  # 2^-limit is still a normal number
    exponents = [max(-limit, min(limit, math.frexp(peak)[1])) for peak in peaks]
    factors = torch.tensor([2.0**-exponent for exponent in exponents], dtype=G.dtype, device=G.device)
    scales = [2.0**exponent if peak > 0.0 else 0.0 for exponent, peak in zip(exponents, peaks, strict=True)]
    return G * factors[:, None, None], scales


def residual_norms(G: Tensor, U: Tensor, S: Tensor, Vh: Tensor) -> list[float]:
    """‖G - U·diag(S)·Vh‖_F in fp64 of each matrix of G (n, m, k), by blocks of rows."""
    num, m, k = G.shape
    rows = max(1, (_BLOCK_ELEMENTS if G.device.type == "cpu" else _GPU_BLOCK_ELEMENTS) // (num * k))
    U, SVh = U.double(), S.double()[:, :, None] * Vh.double()
    blocks = []
    for i in range(0, m, rows):
        difference = G[:, i : i + rows].to(torch.float64, copy=True).baddbmm_(U[:, i : i + rows], SVh, alpha=-1)
        blocks.append(torch.linalg.vector_norm(difference, dim=(1, 2)))
    norms: list[float] = torch.linalg.vector_norm(torch.stack(blocks), dim=0).tolist()
    return norms
