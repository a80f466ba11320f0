"""Sums of products dYᵀX in fp32 or better, whatever the dtype of dY and X."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch

from .precision import full_precision

_HALF = (torch.bfloat16, torch.float16)


def add_product(total: torch.Tensor | None, dY: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    """total + dYᵀX (out, in), in place of `total` if it is given; dY (tokens, out), X (tokens, in).

    Products of half-precision numbers are exact in fp32; they are summed there, straight into `total`, where the
    device's matrix product can (CUDA's). Elsewhere dY and X are copied to fp32 first. Nothing is rounded to half
    precision on the way.
    """
    with full_precision(X.device):
        kind = _fp32_out(X.device, X.dtype) if X.dtype in _HALF and dY.dtype == X.dtype else None
        if kind is None:
            dtype = torch.promote_types(X.dtype, torch.float32)
            dY, X = dY.to(dtype), X.to(dtype)
            return dY.T @ X if total is None else total.addmm_(dY.T, X)
        if total is None:
            return torch.mm(dY.T, X, out_dtype=torch.float32)
        if kind == "addmm":
            return torch.addmm(total, dY.T, X, out_dtype=torch.float32, out=total)
        return total.add_(torch.mm(dY.T, X, out_dtype=torch.float32))


@cache
def _fp32_out(device: torch.device, dtype: torch.dtype) -> Literal["addmm", "mm"] | None:
    """Which products of this torch take `dtype` and give fp32 on that device, found out with a small one.

    "addmm" also adds to a sum in fp32 in place; some versions take only one of the factors' dtype. None: no product.
    """
    A = torch.full((16, 16), 1.0 + 2.0**-7, device=device, dtype=dtype)
    total = torch.ones(16, 16, device=device)
    exact = A.float() @ A.float()
    try:
        if not torch.equal(torch.mm(A.T, A, out_dtype=torch.float32), exact):
            return None
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
        return None
    try:
        torch.addmm(total, A.T, A, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return "mm"
    return "addmm" if torch.equal(total, exact + 1.0) else "mm"
