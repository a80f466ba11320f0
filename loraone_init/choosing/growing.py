"""The samples that a run goes through: the one it was given, or ever larger parts of it until one has settled."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..adapter.records import GrowthReport, GrowthStage
from ..adapter.wording import describe_stage
from ..data.pieces import Half, Piece, split_in_halves
from ..gradients.losses import RowLosses
from .sample_size import Growth, Halved, has_settled, stage_of, why_unsettled

if TYPE_CHECKING:
    from ..data.sample import Sample


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drawn:
    """A sample whose gradients are to be taken: its batches, and their halves if these are to be told apart."""

    batches: list[Any]
    halves: list[Half] | None = None

    @property
    def parts(self) -> list[Any]:
        """What is run."""
        return self.batches if self.halves is None else [half.batch for half in self.halves]

    def halves_of(self, pieces: Sequence[Piece]) -> list[int] | None:
        """The half, 0 or 1, that each of these pieces of the parts belongs to."""
        return None if self.halves is None else [self.halves[piece.index].half for piece in pieces]

    def losses(self, of_parts: list[RowLosses]) -> list[RowLosses]:
        """Of the batches."""
        return of_parts if self.halves is None else join_losses(self.halves, of_parts)


class Samples:
    """Iterate, and judge each sample by its layers before the next is asked for.

    given:  as `initialize` takes it.
    growth: None takes all of it.
    by_row: whether batches may be divided by rows.
    used:   the present sample, in the end that of the adapter.
    """

    def __init__(self, given: Sample | Sequence[Any], growth: Growth | None, by_row: bool) -> None:
        self.used = given
        self._given = given
        self._growth = growth
        self._by_row = by_row
        self._stages: list[GrowthStage] = []
        self._sizes = growth.sizes(_size(given)) if growth else []

    def __iter__(self) -> Iterator[Drawn]:
        if self._growth is None:
            yield Drawn(batches_of(self._given))
            return
        for size in self._sizes:
            self.used = _first(self._given, size)
            batches = batches_of(self.used)
            yield Drawn(batches, split_in_halves(batches, self._by_row))
            logger.info("%s", describe_stage(self._stages[-1]))
            if has_settled(self._stages, self._growth.tolerance):
                return
        logger.warning(
            "the sample has not settled at %d, all that it may have: %s; let it draw more rows, give more data, or"
            " lower the rank",
            *(self._sizes[-1], why_unsettled(self._stages, self._growth.tolerance)),
        )

    def judge(self, layers: Iterable[Halved]) -> None:
        """Note what the present sample gave."""
        if self._growth is not None:
            self._stages.append(stage_of(_size(self.used), layers))

    def report(self) -> GrowthReport | None:
        """None where nothing has grown."""
        if self._growth is None:
            return None
        tolerance = self._growth.tolerance
        return GrowthReport(tolerance, self._sizes[-1], has_settled(self._stages, tolerance), tuple(self._stages))


def batches_of(given: Sample | Sequence[Any]) -> list[Any]:
    """The micro-batches of a sample; a sequence consists of them."""
    return list(getattr(given, "batches", given))  # type: ignore[arg-type]


def _size(given: Sample | Sequence[Any]) -> int:
    """In rows; of a sequence, in batches."""
    return len(getattr(given, "rows", given))  # type: ignore[arg-type]


def _first(given: Sample | Sequence[Any], size: int) -> Sample | Sequence[Any]:
    from ..data.sample import Sample

    return given.first(size) if isinstance(given, Sample) else given[:size]


def join_losses(pieces: Sequence[Half], losses: Sequence[RowLosses]) -> list[RowLosses]:
    """The losses of the batches whose pieces these are."""
    by_batch: dict[int, list[tuple[slice, RowLosses]]] = {}
    for piece, part in zip(pieces, losses, strict=True):
        by_batch.setdefault(piece.index, []).append((piece.rows, part))
    return [_interleaved(by_batch[index]) for index in sorted(by_batch)]


def _interleaved(parts: list[tuple[slice, RowLosses]]) -> RowLosses:
    num_rows = sum(len(part.sums) for _, part in parts)
    sums, counts = (torch.zeros(num_rows, dtype=torch.float64) for _ in range(2))
    for rows, part in parts:
        sums[rows], counts[rows] = part.sums, part.counts
    return RowLosses(sums, counts)
