"""The processes of one run: what each of them works on, and what they tell each other. One process is the usual case.

With torchrun, each process opens the model itself and takes some of the rows through all blocks. Only gradients
travel: each layer's is summed over the processes into the one that computes its SVD.
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
    """The processes of a run, as one of them sees them. All have to make the same calls in the same order."""

    @property
    def index(self) -> int:
        """The number of this process; 0 prints and writes."""
        ...

    @property
    def size(self) -> int: ...

    @property
    def device(self) -> str:
        """The value of --device for this process."""
        ...

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of the processes, in every one."""
        ...

    def share(self, gradients: Iterable[LayerGradient]) -> Iterator[LayerGradient]:
        """Sum the gradients of a block over the processes; those that this process is to decompose."""
        ...

    def first(self) -> AbstractContextManager[None]:
        """One process of each node goes through the context before the others enter: they find what it fetched."""
        ...

    def finish(self) -> None:
        """All have done their part; what follows is the matter of one process."""
        ...


class Alone:
    """One process: nothing to share or to tell."""

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
        """Nobody waits."""


@contextmanager
def joined(device: str, verbose: bool) -> Iterator[Processes]:
    """The processes of this run: those that torchrun started with this process, if any.

    Without it, nothing of torch.distributed is touched. device, verbose: the values of these options.
    """
    if "LOCAL_RANK" not in os.environ or environment_number("WORLD_SIZE", 1, 1) == 1:
        yield Alone(device)
        return
    from .distributed import join

    with join(device, verbose) as processes:
        yield processes
