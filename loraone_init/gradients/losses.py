"""Summed losses of rows: how those of pieces become those of batches, and what is checked of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ..data.pieces import Piece
from ..errors import DataError, NumericalError


def check_losses(losses: Sequence[RowLosses]) -> tuple[float, float]:
    """(mean loss, number of terms) over all rows."""
    total, count = sum_losses(losses)
    if count == 0:
        raise DataError("the batches have no trainable tokens: every label is masked")
    check_finite(total / count)
    return total / count, count


def sum_losses(losses: Sequence[RowLosses]) -> tuple[float, float]:
    """(summed loss, number of terms) over all rows."""
    return sum(float(rows.sums.sum()) for rows in losses), sum(float(rows.counts.sum()) for rows in losses)


def check_finite(mean: float) -> None:
    if not math.isfinite(mean):
        raise NumericalError(f'the loss is {mean}; check the weights; in half precision, `dtype="float32"` may help')


@dataclass(frozen=True)
class RowLosses:
    """The summed loss of each row and the number of its terms (rows,), fp64 on the CPU.

    The loss of a batch that cannot be divided by rows, such as a custom loss, may count as one row.
    """

    sums: torch.Tensor
    counts: torch.Tensor


def join_losses(found: Iterable[tuple[Piece, RowLosses]]) -> list[RowLosses]:
    """The losses of whole batches, in order, from those of the pieces that they were cut into, given in any order.

    A batch of which no piece is given is left out; of a batch of which some pieces are given, these rows are.
    """
    by_batch: dict[int, list[tuple[Piece, RowLosses]]] = {}
    for piece, losses in found:
        by_batch.setdefault(piece.batch_index, []).append((piece, losses))
    return [_joined(by_batch[index]) for index in sorted(by_batch)]


def _joined(pieces: list[tuple[Piece, RowLosses]]) -> RowLosses:
    """The losses of one batch's rows, in the order of the rows."""
    if len(pieces) == 1:
        return pieces[0][1]
    order = torch.tensor([row for piece, _ in pieces for row in piece.rows or ()]).argsort()
    sums, counts = torch.cat([rows.sums for _, rows in pieces]), torch.cat([rows.counts for _, rows in pieces])
    assert len(order) == len(sums), "each row of a piece has one loss"
    return RowLosses(sums[order], counts[order])
