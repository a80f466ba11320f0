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
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from .errors import ConfigError, NumericalError
from .precision import full_precision

logger = logging.getLogger(__name__)

Kind = Literal["absolute", "scale-free"]
Side = Literal["A", "B"]
Gradients = tuple[Tensor | None, Tensor | None]

_MIN_PIVOT = 100.0  # in units of ε times the largest diagonal entry: a smaller pivot has less than about 1 % accuracy
_CACHED = 2**18  # elements of a batch on the CPU: it stays in the cache, and fresh memory is not asked for at each step
_NARROW = 16  # on the CPU, products with fewer columns run at a fraction of the speed


@dataclass(frozen=True)
class FactorPair:
    """One layer's factors, A (r, in) and B (out, r), checked to fit.

    A convolution's factors have further dimensions: (r, in, height, width) and (out, r, 1, 1). The factors of E experts
    are stacked as PEFT stacks them: A (E·r, in) with the expert first, B (out, r·E) with the expert last.
    """

    name: str
    A: Tensor
    B: Tensor
    num_experts: int = 1

    @cached_property
    def layout(self) -> tuple[object, ...]:
        """Equal for pairs of equal shapes."""
        return tuple(self.A.shape), tuple(self.B.shape), self.num_experts

    def __post_init__(self) -> None:
        shapes = f"A {tuple(self.A.shape)} and B {tuple(self.B.shape)}"
        E = self.num_experts
        if min(self.A.ndim, self.B.ndim) < 2 or self.A.shape[0] != self.B.shape[1] or E < 1 or self.A.shape[0] % E:
            experts = f" of {E} experts" if E != 1 else ""
            raise ConfigError(
                f"{self.name}: {shapes} are no pair (r, in), (out, r){experts}; train it with plain AdamW"
            )


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
    for device, stacks in _stacks(pairs, gradients).items():
        with full_precision(device):
            for stack, inverse in _inverses(stacks, damping, kind, logged):
                new[stack.side].update(zip(stack.indices, stack.apply(inverse), strict=True))
    return [(new["A"].get(i), new["B"].get(i)) for i in range(len(pairs))]


def check_damping(damping: float, kind: str) -> None:
    """Raise ConfigError for a kind that does not exist or a damping that is no finite number from 0 on."""
    if kind not in get_args(Kind):
        raise ConfigError(f"the preconditioner's kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    if not (math.isfinite(damping) and damping >= 0):
        raise ConfigError(f"damping must be a finite number, 0 or more, got {damping!r}")


@dataclass(frozen=True)
class _Stack:
    """Gradients of equal shape of one side, and the factors that precondition them: B for g_A, A for g_B.

    Batches are ordered pair by pair, and expert by expert in each.
    """

    side: Side
    num_experts: int
    names: list[str]
    indices: list[int]
    factors: list[Tensor]
    gradients: list[Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: fp32 at least."""
        dtype = torch.promote_types(self.factors[0].dtype, self.gradients[0].dtype)
        return torch.promote_types(dtype, torch.float32)

    @property
    def rank(self) -> int:
        shape = self.factors[0].shape
        return (shape[1] if self.side == "A" else shape[0]) // self.num_experts

    def grams(self, dtype: torch.dtype) -> Tensor:
        """BᵀB or AAᵀ of all, (n, r, r) with n = pairs·E."""
        if self.side == "A":
            return _gram_of_columns(_columns(self.factors, self.num_experts).to(dtype))
        A = _rows(self.factors, self.num_experts).to(dtype)
        return A @ A.mT

    def apply(self, inverse: Tensor) -> list[Tensor]:
        """The preconditioned gradients, of the shape and dtype of those given; inverse (n, r, r)."""
        first, E = self.gradients[0], self.num_experts
        if self.side == "A":
            new = inverse @ _rows(self.gradients, E).to(inverse.dtype)
        else:
            new = _mix_columns(_columns(self.gradients, E).to(inverse.dtype), inverse)
            if E > 1:
                new = new.unflatten(0, (-1, E)).permute(0, 2, 3, 1)
        return list(new.reshape(-1, *first.shape).to(first.dtype).unbind())

    def only(self, pair: int) -> _Stack:
        """One of the pairs alone."""
        one = slice(pair, pair + 1)
        names, indices, factors = self.names[one], self.indices[one], self.factors[one]
        return _Stack(self.side, self.num_experts, names, indices, factors, self.gradients[one])


def _rows(tensors: list[Tensor], E: int) -> Tensor:
    """Tensors of A's shape, (E·r, in, ...), as (n, r, in), with n = pairs·E ordered pair by pair."""
    stacked = torch.stack(tensors).flatten(2)
    return stacked if E == 1 else stacked.unflatten(1, (E, -1)).flatten(0, 1)


def _columns(tensors: list[Tensor], E: int) -> Tensor:
    """Tensors of B's shape, (out, r·E, ...), as (n, out, r), likewise."""
    stacked = torch.stack(tensors).flatten(2)
    return stacked if E == 1 else stacked.unflatten(2, (-1, E)).permute(0, 3, 1, 2).flatten(0, 1)


def _fold(B: Tensor) -> int:
    """How many rows of B (n, out, r) to lay side by side, (n, out/c, c·r), so that products with it are not narrow."""
    c = max(1, _NARROW // B.shape[2]) if B.device.type == "cpu" else 1
    return c if B.shape[1] % c == 0 else 1


def _gram_of_columns(B: Tensor) -> Tensor:
    """BᵀB (n, r, r) of B (n, out, r): of the folded B it is the sum of the c diagonal blocks."""
    c, r = _fold(B), B.shape[2]
    folded = B.reshape(len(B), -1, c * r)
    gram = folded.mT @ folded
    return gram if c == 1 else gram.view(-1, c, r, c, r).diagonal(dim1=1, dim2=3).sum(-1)


def _mix_columns(g: Tensor, M: Tensor) -> Tensor:
    """g·M for g (n, out, r), M (n, r, r): the folded g times the block-diagonal matrix of c times M."""
    c, r = _fold(g), g.shape[2]
    if c == 1:
        return g @ M
    blocks = M.new_zeros(len(M), c, r, c, r)
    blocks.diagonal(dim1=1, dim2=3).copy_(M[..., None].expand(-1, -1, -1, c))
    return (g.reshape(len(g), -1, c * r) @ blocks.view(-1, c * r, c * r)).view_as(g)


def _stacks(pairs: Sequence[FactorPair], gradients: Sequence[Gradients]) -> dict[torch.device, list[_Stack]]:
    """All that there is to do, by device."""
    alike: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for i, (pair, (grad_A, grad_B)) in enumerate(zip(pairs, gradients, strict=True)):
        A, B = pair.A, pair.B
        alike[pair.layout, A.device, A.dtype, B.dtype, grad_A is None, grad_B is None].append(i)
    stacks: dict[torch.device, list[_Stack]] = defaultdict(list)
    for indices in alike.values():
        first, (grad_A, grad_B) = pairs[indices[0]], gradients[indices[0]]
        device, E = first.A.device, first.num_experts
        at_once = len(indices) if device.type != "cpu" else max(1, _CACHED // max(first.A.numel(), first.B.numel()))
        for start in range(0, len(indices), at_once):
            some = indices[start : start + at_once]
            names = [pairs[i].name for i in some]
            if grad_A is not None:
                of_A = [g for i in some if (g := gradients[i][0]) is not None]
                stacks[device].append(_Stack("A", E, names, some, [pairs[i].B for i in some], of_A))
            if grad_B is not None:
                of_B = [g for i in some if (g := gradients[i][1]) is not None]
                stacks[device].append(_Stack("B", E, names, some, [pairs[i].A for i in some], of_B))
    return stacks


def _inverses(stacks: list[_Stack], damping: float, kind: Kind, logged: set[str]) -> Iterator[tuple[_Stack, Tensor]]:
    """Each stack with its inverses (n, r, r), all of one rank and dtype from one factorisation."""
    batches: dict[tuple[int, torch.dtype], list[_Stack]] = defaultdict(list)
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


def _retry(stack: _Stack, items: list[int], damping: float, kind: Kind, logged: set[str]) -> Tensor:
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


def _singular(stack: _Stack, factor: Tensor, damping: float, kind: Kind) -> str:
    name, gram = ("B", "BᵀB") if stack.side == "A" else ("A", "AAᵀ")
    what = f"{gram} + damping·I ({stack.rank}, {stack.rank}), {kind}, cannot be inverted: {name} {tuple(factor.shape)}"
    if not factor.isfinite().all():
        return f"{what} has NaN or infinite entries; use a lower learning rate or clip gradients"
    return f"{what} is rank-deficient and damping is {damping:g}; pass a larger damping"


def _log_once(level: int, message: str, logged: set[str]) -> None:
    if message not in logged:
        logged.add(message)
        logger.log(level, message)
