"""LoRA factors and gradients of equal shapes as batches of matrices, for `preconditioning`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from ..errors import ConfigError

Side = Literal["A", "B"]
Gradients = tuple[Tensor | None, Tensor | None]  # of A and of B

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


@dataclass(frozen=True)
class Stack:
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

    def only(self, pair: int) -> Stack:
        """One of the pairs alone."""
        one = slice(pair, pair + 1)
        names, indices, factors = self.names[one], self.indices[one], self.factors[one]
        return Stack(self.side, self.num_experts, names, indices, factors, self.gradients[one])


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


def stacks_by_device(pairs: Sequence[FactorPair], gradients: Sequence[Gradients]) -> dict[torch.device, list[Stack]]:
    """All that there is to do, by device."""
    alike: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for i, (pair, (grad_A, grad_B)) in enumerate(zip(pairs, gradients, strict=True)):
        A, B = pair.A, pair.B
        alike[pair.layout, A.device, A.dtype, B.dtype, grad_A is None, grad_B is None].append(i)
    stacks: dict[torch.device, list[Stack]] = defaultdict(list)
    for indices in alike.values():
        first, (grad_A, grad_B) = pairs[indices[0]], gradients[indices[0]]
        device, E = first.A.device, first.num_experts
        at_once = len(indices) if device.type != "cpu" else max(1, _CACHED // max(first.A.numel(), first.B.numel()))
        for start in range(0, len(indices), at_once):
            some = indices[start : start + at_once]
            names = [pairs[i].name for i in some]
            if grad_A is not None:
                of_A = [g for i in some if (g := gradients[i][0]) is not None]
                stacks[device].append(Stack("A", E, names, some, [pairs[i].B for i in some], of_A))
            if grad_B is not None:
                of_B = [g for i in some if (g := gradients[i][1]) is not None]
                stacks[device].append(Stack("B", E, names, some, [pairs[i].A for i in some], of_B))
    return stacks
