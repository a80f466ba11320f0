"""The processes of a trainer that torch.distributed has brought together already."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from .dealing import deal_out, gathered, summed_on
from .processes import Alone, Processes

if TYPE_CHECKING:
    from ..linalg.layer_gradient import LayerGradient


T = TypeVar("T")


def existing_processes(device: torch.device) -> Processes:
    """All processes of the default group, this one alone where there is none. device: of this one's model."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return _DefaultGroup(device)
    return Alone(str(device))


class _DefaultGroup:
    """The default group, which stays when the work is done (see `Processes`)."""

    def __init__(self, device: torch.device) -> None:
        self.index = dist.get_rank()
        self.size = dist.get_world_size()
        self.device = "cpu" if dist.get_backend() == "gloo" else str(device)
        self._owned = [0] * self.size

    def gather(self, value: T) -> list[T]:
        return gathered(value)

    def share(self, gradients: Iterable[LayerGradient]) -> Iterator[LayerGradient]:
        yield from deal_out(gradients, self.index, self._owned, self._sum)

    def _sum(self, part: torch.Tensor, owner: int) -> torch.Tensor:
        return summed_on(part, self.device, owner)

    @contextmanager
    def first(self) -> Iterator[None]:
        leads = os.environ.get("LOCAL_RANK", "0") == "0"
        if not leads:
            dist.barrier()
        yield
        if leads:
            dist.barrier()

    def finish(self) -> None:
        dist.barrier()
