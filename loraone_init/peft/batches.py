"""Which rows of batches the gradient is from, and which are held out of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch.utils.data import DataLoader

from ..data.options import HELD_OUT
from ..data.pieces import Piece, whole_batches
from ..errors import DataError
from ..ranges import check_range, is_whole

FROM_LOADER = 64
"""Rows that are taken of a `DataLoader`, which may have the whole training data, if nothing else is said."""


def take_batches(
    data: Iterable[Any], samples: int | None, held_out: Iterable[Any] | int | None, *, needed: bool, by_row: bool
) -> tuple[list[Any], list[Any]]:
    """(batches for the gradient, batches held out), both from the front of `data` unless others are held out.

    samples:  rows for the gradient; None: `FROM_LOADER` of a DataLoader, all of anything else.
    held_out: batches, or how many rows to hold out; None: `HELD_OUT`, or a quarter if there are too few, where they are
              needed, else none. They come after the rows for the gradient.
    needed:   whether γ is searched with them.
    by_row:   whether batches may be cut between rows; if not, a batch counts as one row.

    Raises DataError where there are not enough rows, ConfigError for an impossible number.
    """
    if samples is None and isinstance(data, DataLoader):
        samples = FROM_LOADER
    if samples is not None:
        check_range("samples", samples)
    given = held_out if held_out is None or is_whole(held_out) else list(_listed(held_out))
    number = HELD_OUT if given is None and needed else given if isinstance(given, int) else 0
    pieces = _first(_listed(data), by_row, None if samples is None else samples + number)
    rows = sum(piece.num_rows for piece in pieces)
    if isinstance(given, int) and number >= rows:
        raise DataError(f"there are {rows} rows, of which {number} cannot be held out; give more, or hold out fewer")
    if given is None and needed:
        number = min(number, max(1, rows // 4)) if rows > 1 else 0  # then γ is searched on the gradient's own row
    used, beyond = _divided(pieces, rows - number)
    return used, given if isinstance(given, list) else beyond


def _listed(data: Any) -> Iterable[Any]:
    if isinstance(data, (str, Mapping)) or not isinstance(data, Iterable):
        raise DataError(
            f"got {type(data).__name__}, expected batches, a DataLoader, or a Sample (load_sample reads files)"
        )
    return data


def _first(batches: Iterable[Any], by_row: bool, limit: int | None) -> list[Piece]:
    """As many pieces as hold `limit` rows, the last one cut; all of them for None."""
    pieces: list[Piece] = []
    left = limit
    for batch in batches:
        if left == 0:
            break
        (piece,) = whole_batches([batch], by_row)
        if left is not None:
            piece = piece if piece.num_rows <= left else piece.cut(slice(left))
            left -= piece.num_rows
        pieces.append(piece)
    return pieces


def _divided(pieces: Iterable[Piece], count: int) -> tuple[list[Any], list[Any]]:
    """The contents of the first `count` rows, and of all others."""
    first, rest = [], []
    for piece in pieces:
        own = max(0, min(count, piece.num_rows))
        count -= own
        if own:
            first.append(piece.content if own == piece.num_rows else piece.cut(slice(own)).content)
        if own < piece.num_rows:
            rest.append(piece.content if own == 0 else piece.cut(slice(own, None)).content)
    return first, rest
