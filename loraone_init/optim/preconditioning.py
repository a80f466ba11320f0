"""Preconditioned gradients of LoRA factors, from the factors alone (Zhang & Pilanci 2024, arXiv 2402.02347, eq. 3).

    absolute:    g_A ← (BᵀB + λI)⁻¹·g_A                   g_B ← g_B·(AAᵀ + λI)⁻¹
    scale-free:  g_A ← (BᵀB/(tr(BᵀB)/r) + δI)⁻¹·g_A       g_B ← g_B·(AAᵀ/(tr(AAᵀ)/r) + δI)⁻¹

With plain gradient descent it makes the rate independent of the condition number of what is learnt (LoRA-One,
arXiv 2502.01235, theorem 4.2). Under Adam two things are to be known. A diagonal preconditioner only rescales rows,
which Adam's own normalisation undoes; at a spectral start BᵀB is diagonal. And the absolute form has a trap: as the
factors grow, BᵀB grows by orders of magnitude and the preconditioned gradient shrinks, while Adam's second moments
remember it large, so that the effective step collapses. The scale-free form divides by the mean eigenvalue of the Gram
matrix, which takes that scale out.

B = 0, where plain LoRA starts: the absolute form gives g_A/λ. The scale-free Gram matrix is 0/0 and is taken as I, the
mean over all directions, so g_A/(1 + δ); g_A itself is zero there, since it contains the factor Bᵀ.

Where the Cholesky factorisation fails in fp32, or its smallest pivot is near rounding, it is done again in fp64, from
the factors, and logged; where that fails too, NumericalError is raised. There is no silent identity.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..adapter.records import Kind, check_damping
from ..errors import NumericalError
from ..linalg.precision import full_precision
from .stacking import FactorPair, Gradients, Side, Stack, stacks_by_device

logger = logging.getLogger(__name__)


_MIN_PIVOT = 100.0  # in units of ε times the largest diagonal entry: a smaller pivot has less than about 1 % accuracy


def precondition(
    A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, damping: float, kind: Kind
) -> tuple[Tensor, Tensor]:
    """(BᵀB + λI)⁻¹·g_A and g_B·(AAᵀ + λI)⁻¹, both Gram matrices from the factors given; see the module for scale-free.

    A, grad_A (r, in); B, grad_B (out, r). Computed in fp32 at least, returned in the gradients' dtypes.
    Raises ConfigError for an impossible damping or pair, NumericalError where a Gram matrix cannot be inverted.
    """
    ((new_A, new_B),) = precondition_pairs([FactorPair("this pair", A, B)], [(grad_A, grad_B)], damping, kind)
    assert new_A is not None
    assert new_B is not None
    return new_A, new_B


@torch.no_grad()
def precondition_pairs(
    pairs: Sequence[FactorPair],
    gradients: Sequence[Gradients],
    damping: float,
    kind: Kind,
    logged: set[str] | None = None,
) -> list[Gradients]:
    """`precondition` of many pairs. gradients: (grad_A, grad_B) of each pair, None where a factor has none.

    Equal shapes are multiplied in one batch, and all Gram matrices of one rank are inverted in one. The host waits
    once for each device. `logged` holds what need not be logged again, and is added to.
    """
    check_damping(damping, kind)
    logged = set() if logged is None else logged
    new: dict[Side, dict[int, Tensor]] = {"A": {}, "B": {}}
    for device, stacks in stacks_by_device(pairs, gradients).items():
        with full_precision(device):
            for stack, inverse in _inverses(stacks, damping, kind, logged):
                new[stack.side].update(zip(stack.indices, stack.apply(inverse), strict=True))
    return [(new["A"].get(i), new["B"].get(i)) for i in range(len(pairs))]


def _inverses(stacks: list[Stack], damping: float, kind: Kind, logged: set[str]) -> Iterator[tuple[Stack, Tensor]]:
    """Each stack with its inverses (n, r, r), all of one rank and dtype from one factorisation."""
    batches: dict[tuple[int, torch.dtype], list[Stack]] = defaultdict(list)
    for stack in stacks:
        batches[stack.rank, stack.dtype].append(stack)
    results = []
    for (_, dtype), batch in batches.items():
        grams = [stack.grams(dtype) for stack in batch]
        inverses, accurate = _invert(torch.cat(grams), damping, kind)
        results.append((batch, inverses.split([len(gram) for gram in grams]), accurate))
    failed = (~torch.cat([accurate for *_, accurate in results])).nonzero().flatten().tolist()  # the host waits here
    start = 0
    for batch, inverses, _ in results:
        for stack, inverse in zip(batch, inverses, strict=True):
            items = [item - start for item in failed if start <= item < start + len(inverse)]
            if items:
                inverse[items] = _retry(stack, items, damping, kind, logged).to(inverse.dtype)
            start += len(inverse)
            yield stack, inverse


def _invert(gram: Tensor, damping: float, kind: Kind) -> tuple[Tensor, Tensor]:
    """(M⁻¹ (n, r, r), whether it is accurate (n,)) for M = gram + λI, or the scale-free form."""
    eps, tiny = torch.finfo(gram.dtype).eps, torch.finfo(gram.dtype).tiny
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    M = (gram / mean[:, None, None] if kind == "scale-free" else gram) + damping * identity
    L, info = torch.linalg.cholesky_ex(M)
    smallest = L.diagonal(dim1=-2, dim2=-1).square().amin(-1)
    largest = M.diagonal(dim1=-2, dim2=-1).amax(-1)
    accurate = (info == 0) & (smallest > _MIN_PIVOT * eps * largest)  # not so either where there are NaN
    if kind == "scale-free":
        accurate &= mean > tiny / eps
    return torch.cholesky_inverse(torch.where(accurate[:, None, None], L, identity)), accurate


def _retry(stack: Stack, items: list[int], damping: float, kind: Kind, logged: set[str]) -> Tensor:
    """M⁻¹ of some items, in fp64 from the factors. Raises NumericalError where that does not work either."""
    E = stack.num_experts
    gram = torch.stack([stack.only(item // E).grams(torch.float64)[item % E] for item in items])
    zero = ~gram.flatten(1).any(-1)
    if kind == "scale-free":
        gram[zero] = torch.eye(stack.rank, dtype=gram.dtype, device=gram.device)
    inverse, accurate = _invert(gram, damping, kind)
    factor = "B" if stack.side == "A" else "A"
    for item, is_zero, is_accurate in zip(items, zero.tolist(), accurate.tolist(), strict=True):
        name = stack.names[item // E] + (f", expert {item % E}" if E > 1 else "")
        if not is_accurate:
            raise NumericalError(f"{name}: {_singular(stack, stack.factors[item // E], damping, kind)}")
        if is_zero:
            _log_once(logging.DEBUG, f"{name}: {factor} = 0, its normalised Gram matrix is taken as I", logged)
        else:
            message = f"{name}: the preconditioner from {factor} is ill-conditioned in {stack.dtype}, inverted in fp64"
            _log_once(logging.WARNING, message, logged)
    return inverse


def _singular(stack: Stack, factor: Tensor, damping: float, kind: Kind) -> str:
    name, gram = ("B", "BᵀB") if stack.side == "A" else ("A", "AAᵀ")
    what = f"{gram} + damping·I ({stack.rank}, {stack.rank}), {kind}, cannot be inverted: {name} {tuple(factor.shape)}"
    if not factor.isfinite().all():
        return f"{what} has NaN or infinite entries; use a lower learning rate or clip gradients"
    return f"{what} is rank-deficient and damping is {damping:g}; pass a larger damping"


def _log_once(level: int, message: str, logged: set[str]) -> None:
    if message not in logged:
        logged.add(message)
        logger.log(level, message)
