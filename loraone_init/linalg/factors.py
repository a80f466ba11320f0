"""The LoRA-One starting factors (arXiv 2502.01235, Algorithm 1, lines 3-6)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, repr=False)
class LoraPair:
    """One layer's factors: A = lora_A (r, in), B = lora_B (out, r); the adapted weight is W + s·B·A."""

    A: torch.Tensor
    B: torch.Tensor

    def __repr__(self) -> str:
        sizes = (f"{name} {'×'.join(map(str, factor.shape))}" for name, factor in (("A", self.A), ("B", self.B)))
        return f"LoraPair({', '.join(sizes)}, {str(self.A.dtype).removeprefix('torch.')})"


def spectral_init(
    U: torch.Tensor,
    S: torch.Tensor,
    Vh: torch.Tensor,
    gamma: float,
    generator: torch.Generator,
    *,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> LoraPair:
    """B₀ = −γ^(−1/2)·U·Ŝ^(1/2), A₀ = γ^(−1/2)·Ŝ^(1/2)·Vh with Ŝ = S/S[0], from G ≈ U·diag(S)·Vh.

    U (out, r), S (r,) descending, Vh (r, in). The minus makes it a descent step: s·B₀A₀ = −(s/(γ·S[0]))·G_r.
    Beyond the numerical rank of G the rows of A are standard-initialised from `generator` and the columns of B zero, as
    in plain LoRA, so that these directions can still be learnt. rank: that rank, or None where S is exactly zero there.
    Returns factors of `dtype` on the CPU: fp32, as adapters are, or fp64 to keep what U, S and Vh have of it.
    """
    top = S[0].item()
    root = (S / top / gamma).sqrt() if top > 0 else torch.zeros_like(S)
    B = (-U * root).to(device="cpu", dtype=dtype)
    A = (root[:, None] * Vh).to(device="cpu", dtype=dtype)
    used = int((S > 0).sum()) if rank is None else rank
    B[:, used:] = 0.0
    A[used:] = standard_rows(len(A) - used, A.shape[1], generator)
    return LoraPair(A.contiguous(), B.contiguous())


def shortened(pair: LoraPair, gamma: float, rank: int) -> LoraPair:
    """The factors of a step that is 1/γ as long: A and B times γ^(−1/2), but for the rows of A beyond `rank`.

    From those that `spectral_init` gives for γ = 1, whatever γ is decided on afterwards.
    """
    factor = gamma**-0.5
    A = torch.cat([pair.A[:rank] * factor, pair.A[rank:]])
    return LoraPair(A, pair.B * factor)


def standard_rows(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Rows of A as PEFT draws them: Kaiming-uniform with a = √5, which is U(−1/√in, 1/√in)."""
    bound = 1.0 / math.sqrt(columns)
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
