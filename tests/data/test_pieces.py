"""Batches cut by rows: every row goes to one piece, and a piece knows its rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.causal import make_batches

from loraone_init.data.pieces import (
    Piece,
    cut_rows,
    halve_until_below,
    shares_of,
    split_in_halves,
    whole_batches,
)

OPAQUE: list[Any] = [("a",), ("b",), ("c",)]


def assert_every_row_once(pieces: list[Piece], batches: list[dict[str, torch.Tensor]]) -> None:
    """Each piece consists of the rows that it says it does, and all together of each row once."""
    for piece in pieces:
        assert piece.rows is not None
        wanted = cut_rows(batches[piece.batch_index], torch.tensor(piece.rows))
        assert piece.content.keys() == wanted.keys()
        assert all(torch.equal(piece.content[key], value) for key, value in wanted.items())
    found = sorted((piece.batch_index, row) for piece in pieces for row in piece.rows or ())
    assert found == [(index, row) for index, batch in enumerate(batches) for row in range(len(batch["input_ids"]))]


# Which batches can be divided.


def test_a_batch_is_whole_before_it_is_cut() -> None:
    batches = make_batches((9, 12), rows=3)
    assert whole_batches(batches, by_row=True) == [Piece(0, batches[0], range(3)), Piece(1, batches[1], range(3))]


@pytest.mark.parametrize(
    "batch",
    [
        ("any", "thing"),
        torch.zeros(4, 9),
        {"pixels": torch.zeros(4, 9)},
        {**make_batches((9,), rows=4)[0], "position_ids": torch.arange(9)[None]},
        {**make_batches((9,), rows=4)[0], "temperature": torch.tensor(0.5)},
        {**make_batches((9,), rows=4)[0], "names": ["a", "b", "c", "d"]},
    ],
    ids=["tuple", "tensor", "other names", "tensor of one row", "tensor without rows", "no tensor"],
)
def test_batches_that_are_not_rows_throughout_cannot_be_divided(batch: Any) -> None:
    [piece] = whole_batches([batch], by_row=True)
    assert piece.rows is None
    assert piece.content is batch
    assert halve_until_below(piece, 1) == [piece]
    assert sorted(map(len, shares_of([piece], 2))) == [0, 1]


def test_batches_are_not_divided_where_the_loss_is_no_sum_over_rows() -> None:
    assert [piece.rows for piece in whole_batches(make_batches(rows=4), by_row=False)] == [None] * 3


# Pieces of pieces.


def test_a_cut_counts_within_the_piece() -> None:
    [whole] = whole_batches([{"input_ids": torch.arange(10)[:, None]}], by_row=True)
    odd = whole.cut(slice(1, None, 2))
    assert (odd.rows, odd.content["input_ids"].flatten().tolist()) == (range(1, 11, 2), [1, 3, 5, 7, 9])
    inner = odd.cut(slice(1, 3))
    assert inner.content["input_ids"].flatten().tolist() == list(inner.rows or ()) == [3, 5]


def test_whatever_cuts_in_whatever_order_every_row_is_there_once() -> None:
    batches = make_batches((9, 12, 7, 30), rows=5)
    shares = shares_of(split_in_halves(whole_batches(batches, by_row=True)), 3)
    pieces = [part for share in shares for piece in share for part in halve_until_below(piece, 15)]
    assert max(piece.num_rows for piece in pieces) > 1
    assert len(pieces) > sum(map(len, shares))
    assert_every_row_once(pieces, batches)


# Halves of a sample.


def test_rows_alternate_between_the_halves() -> None:
    batches = [{"input_ids": torch.arange(rows)[:, None] + 10 * rows} for rows in (3, 1, 2)]
    pieces = split_in_halves(whole_batches(batches, by_row=True))
    assert [piece.half for piece in pieces] == sorted(piece.half for piece in pieces)
    rows = [[int(row) for p in pieces if p.half == half for row in p.content["input_ids"]] for half in (0, 1)]
    assert rows == [[30, 32, 20], [31, 10, 21]]
    assert_every_row_once(pieces, batches)


def test_opaque_batches_alternate() -> None:
    pieces = split_in_halves(whole_batches(OPAQUE, by_row=True))
    assert [(piece.content, piece.half) for piece in pieces] == [(("a",), 0), (("c",), 0), (("b",), 1)]


# Shares of processes.


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 50])
def test_every_row_belongs_to_one_process(size: int) -> None:
    batches = make_batches((9, 12, 7, 30), rows=5)
    shares = shares_of(whole_batches(batches, by_row=True), size)
    assert len(shares) == size
    pieces = [piece for share in shares for piece in share]
    assert_every_row_once(pieces, batches)
    order = [(piece.batch_index, row) for piece in pieces for row in piece.rows or ()]
    assert order == sorted(order)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_processes_differ_by_one_row_at_most(size: int) -> None:
    batches = make_batches((9, 12, 7, 30, 31, 32), rows=8)
    shares = shares_of(whole_batches(batches, by_row=True), size)
    tokens = [sum(piece.num_tokens for piece in share) for share in shares]
    assert max(tokens) <= sum(tokens) / size + 32


def test_one_process_takes_the_batches_as_they_are() -> None:
    batches = make_batches()
    [share] = shares_of(whole_batches(batches, by_row=True), 1)
    assert all(piece.content is batch for piece, batch in zip(share, batches, strict=True))


def test_opaque_batches_are_dealt_out_whole() -> None:
    a, b, c = whole_batches(OPAQUE, by_row=True)
    assert shares_of([a, b, c], 2) == [[a], [b, c]]
    whole = make_batches(rows=4)
    shares = shares_of(whole_batches(whole, by_row=False), 2)
    assert [piece.content for share in shares for piece in share] == whole


# Parts that fit in memory.


def test_halving_ends_below_the_limit() -> None:
    batches = make_batches((10,), rows=7)
    [piece] = whole_batches(batches, by_row=True)
    parts = halve_until_below(piece, 30)
    assert [part.rows for part in parts] == [range(2), range(2, 4), range(4, 6), range(6, 7)]
    assert_every_row_once(parts, batches)
    assert halve_until_below(piece, 71) == [piece]


def test_a_single_row_is_not_halved() -> None:
    [piece] = whole_batches(make_batches((10,), rows=3), by_row=True)
    assert [part.rows for part in halve_until_below(piece, 1)] == [range(1), range(1, 2), range(2, 3)]
