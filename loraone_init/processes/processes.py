"""The processes of one run, and what they tell each other. One process is the usual case.

With torchrun, each process opens the model itself and takes its share of the rows (`data.pieces.shares_of`) through all
blocks. Only gradients and losses travel: the gradient of each layer is summed over the processes into the one that
computes its SVD.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol, TypeVar

from ..environment import environment_number

if TYPE_CHECKING:
    from ..linalg.layer_gradient import LayerGradient


T = TypeVar("T")


class Processes(Protocol):
    """The processes of a run, as one of them sees them. All of them have to make the same calls in the same order."""

    @property
    def index(self) -> int:
        """The number of this process, from 0 on. Process 0 prints and writes."""
        ...

    @property
    def size(self) -> int:
        """The number of processes."""
        ...

    @property
    def device(self) -> str:
        """What `open_model` takes as the device of this process."""
        ...

    def gather(self, value: T) -> list[T]:
        """The values that all processes give, in the order of the processes. Every process gets all of them."""
        ...

    def share(self, gradients: Iterable[LayerGradient]) -> Iterator[LayerGradient]:
        """The gradients that this process is to decompose, each summed over all processes.

        gradients: what this process's rows add to the gradients of some layers, of one block as a rule. Each layer is
                   dealt out to one of the processes.
        """
        ...

    def first(self) -> AbstractContextManager[None]:
        """A context that one process of each node passes before the others enter it, so that they find what the first
        has fetched.
        """
        ...

    def finish(self) -> None:
        """Wait until all processes have done their part. What follows is the matter of one process."""
        ...


class Alone:
    """A run of one process, which has nobody to share with or to tell."""

    index, size = 0, 1

    def __init__(self, device: str = "auto") -> None:
        self.device = device

    def gather(self, value: T) -> list[T]:
        return [value]

    def share(self, gradients: Iterable[LayerGradient]) -> Iterator[LayerGradient]:
        yield from gradients

    def first(self) -> AbstractContextManager[None]:
        return nullcontext()

    def finish(self) -> None:
        """There is nobody to wait for."""


@contextmanager
def joined(device: str, verbose: bool) -> Iterator[Processes]:
    """The processes of this run: those that torchrun has started together with this one, or this one alone.

    Without torchrun, nothing of torch.distributed is imported. device, verbose: the values of these options.
    """
    if "LOCAL_RANK" not in os.environ or environment_number("WORLD_SIZE", 1, 1) == 1:
        yield Alone(device)
        return
    from .distributed import join

    with join(device, verbose) as processes:
        yield processes
