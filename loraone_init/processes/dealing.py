"""Which process decomposes the gradient of which layer, and how values and gradients come together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from ..linalg.layer_gradient import LayerGradient


T = TypeVar("T")


def gathered(value: T) -> list[T]:
    """The values that all processes of the default group give, in their order."""
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def summed_on(part: torch.Tensor, device: str, owner: int, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The sum over all processes, right on the owner alone."""
    total = part.to(device).contiguous()
    dist.reduce(total, dst=owner, group=group)
    return total


def deal_out(
    gradients: Iterable[LayerGradient],
    index: int,
    owned: list[int],
    sum_on: Callable[[torch.Tensor, int], torch.Tensor],
) -> Iterator[LayerGradient]:
    """The gradients that process `index` is to decompose, summed over all. Each goes to who has the least to do.

    owned:  the numbers of each process's gradients so far, which are added to; the same everywhere.
    sum_on: sums a tensor over all processes, on the one of this number; what the others get does not count.
    """
    waiting = sorted(gradients, key=lambda gradient: gradient.numel)  # those of a block are there in any case
    mine, load = [], [0] * len(owned)
    while waiting:
        gradient = waiting.pop()  # the largest first: the others fill up what it leaves uneven
        owner = min(range(len(owned)), key=lambda rank: (load[rank], owned[rank]))
        load[owner] += gradient.numel
        owned[owner] += gradient.numel
        parts = tuple(sum_on(part, owner) for part in gradient.parts)
        if owner == index:
            mine.append(replace(gradient, parts=parts))
        del gradient, parts
    while mine:
        yield mine.pop()
