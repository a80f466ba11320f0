"""The processes of one run: what each of them works on, and what they tell each other. One process is the usual case.

With torchrun, each process (rank) opens the model itself and takes some of the rows through all blocks. Only gradients
travel: each layer's is summed over the ranks into the one that computes its SVD.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

if TYPE_CHECKING:
    from .collector import LayerGradient

T = TypeVar("T")


class Ranks(Protocol):
    """The processes of a run, as one of them sees them. All have to make the same calls in the same order."""

    @property
    def rank(self) -> int:
        """The number of this process; 0 prints and writes."""
        ...

    @property
    def size(self) -> int: ...

    @property
    def device(self) -> str:
        """The value of --device for this process."""
        ...

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in order of ranks, on every rank."""
        ...

    def share(self, gradients: Iterable[LayerGradient]) -> Iterator[LayerGradient]:
        """Sum the gradients of a block over the ranks; those that this rank is to decompose."""
        ...

    def first(self) -> AbstractContextManager[None]:
        """One rank of each node goes through the context before the others enter: they find what it fetched."""
        ...

    def finish(self) -> None:
        """All have done their part; what follows is the matter of one rank."""
        ...


class Alone:
    """One process: nothing to share or to tell."""

    rank, size = 0, 1

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
def joined(device: str, verbose: bool) -> Iterator[Ranks]:
    """The ranks of this run: those that torchrun started with this process, if any.

    Without it, nothing of torch.distributed is touched. device, verbose: the values of these options.
    """
    if "LOCAL_RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Alone(device)
        return
    from .distributed import join

    with join(device, verbose) as ranks:
        yield ranks


@dataclass(frozen=True)
class Piece:
    """Rows of the micro-batch number `index`, or all of it."""

    index: int
    batch: Any


def share_of(batches: Sequence[Any], rank: int, size: int, by_row: bool) -> list[Piece]:
    """What `rank` of `size` takes of the micro-batches: consecutive rows, as many tokens as the others within a row.

    by_row: whether a micro-batch may be divided; else it goes to one rank as a whole. A row (or micro-batch) belongs to
            the rank into whose share of all tokens, padding included, its middle falls. There can be ranks without any.
    """
    units = [_units(batch, by_row) for batch in batches]
    total = sum(tokens * count for count, tokens in units)
    pieces, before = [], 0.0
    for index, (batch, (count, tokens)) in enumerate(zip(batches, units, strict=True)):
        middles = [before + (row + 0.5) * tokens for row in range(count)]
        mine = [row for row, middle in enumerate(middles) if int(middle * size / total) == rank]
        before += tokens * count
        if len(mine) == count:
            pieces.append(Piece(index, batch))
        elif mine:
            rows = slice(mine[0], mine[-1] + 1)
            pieces.append(Piece(index, {key: value[rows] for key, value in batch.items()}))
    return pieces


def _units(batch: Any, by_row: bool) -> tuple[int, int]:
    """(rows that can be told apart, tokens of each): (1, 1) where nothing is known of the batch."""
    if not (isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), torch.Tensor)):
        return 1, 1
    ids = batch["input_ids"]
    rows = num_rows(batch) if by_row else None
    return (1, ids.numel()) if rows is None else (rows, ids[0].numel())


def num_rows(batch: Any) -> int | None:
    """Of a batch that can be divided: a mapping whose tensors all have its rows; None for any other."""
    if not (isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), torch.Tensor)):
        return None
    rows = len(batch["input_ids"])
    alike = all(isinstance(t, torch.Tensor) and t.ndim and len(t) == rows for t in batch.values())
    return rows if alike else None
