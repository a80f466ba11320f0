"""Losses of pieces become losses of batches, row by row, however the batches were cut and whoever ran them."""

from __future__ import annotations

import pytest
import torch
from support.causal import make_batches

from loraone_init.data.pieces import Piece, halve_until_below, shares_of, split_in_halves, whole_batches
from loraone_init.gradients.losses import RowLosses, join_losses


def numbered(piece: Piece) -> tuple[Piece, RowLosses]:
    """A piece with a loss for each row that tells which row it is: 10·batch + row, of row + 1 terms."""
    rows = torch.tensor(piece.rows, dtype=torch.float64)
    return piece.without_content(), RowLosses(10 * piece.batch_index + rows, rows + 1)


@pytest.mark.parametrize("in_halves", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("limit", [1, 20, 1000])
def test_rows_come_back_in_their_order(in_halves: bool, size: int, limit: int) -> None:
    pieces = whole_batches(make_batches((9, 12, 7), rows=3), by_row=True)
    if in_halves:
        pieces = split_in_halves(pieces)
    run = [part for share in shares_of(pieces, size) for piece in share for part in halve_until_below(piece, limit)]
    joined = join_losses(map(numbered, run))
    assert [losses.sums.tolist() for losses in joined] == [[0, 1, 2], [10, 11, 12], [20, 21, 22]]
    assert [losses.counts.tolist() for losses in joined] == [[1, 2, 3]] * 3


def test_rows_that_one_process_has_are_joined_without_the_others() -> None:
    [whole] = whole_batches(make_batches((9,), rows=6), by_row=True)
    mine = whole.cut(slice(3, None))
    [joined] = join_losses(map(numbered, reversed(halve_until_below(mine, 18))))
    assert joined.sums.tolist() == [3, 4, 5]


def test_losses_of_batches_that_cannot_be_divided_stay_as_they_are() -> None:
    losses = [RowLosses(torch.tensor([x]).double(), torch.ones(1).double()) for x in (3.0, 4.0, 5.0)]
    pieces = split_in_halves(whole_batches([("a",), ("b",), ("c",)], by_row=False))
    found = join_losses([(piece, losses[piece.batch_index]) for piece in pieces])
    assert all(one is other for one, other in zip(found, losses, strict=True))
