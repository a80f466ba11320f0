"""Summed losses of rows, and what is checked of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

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
    """Summed losses and their counts (rows,), fp64 on the CPU; a custom loss counts as one row for each batch."""

    sums: torch.Tensor
    counts: torch.Tensor

    def followed_by(self, other: RowLosses) -> RowLosses:
        """Those of both, these rows first."""
        return RowLosses(torch.cat([self.sums, other.sums]), torch.cat([self.counts, other.counts]))
