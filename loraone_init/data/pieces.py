"""Batches cut into pieces: shares of several processes, and halves of a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


def halves_below(part: Any, limit: int) -> list[Any]:
    rows = num_rows(part) or 0
    if rows < 2 or num_tokens(part) < limit:
        return [part]
    middle = (rows + 1) // 2
    halves = [{key: value[chunk] for key, value in part.items()} for chunk in (slice(middle), slice(middle, None))]
    return [piece for half in halves for piece in halves_below(half, limit)]


def num_tokens(part: Any) -> int:
    return int(part["input_ids"].numel())


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


@dataclass(frozen=True)
class Half:
    """The rows of batch number `index` that belong to one half, 0 or 1, of the sample."""

    index: int
    half: int
    batch: Any
    rows: slice


def split_in_halves(batches: Sequence[Any], by_row: bool) -> list[Half]:
    """All batches in halves, the first half's first: every other row, or every other batch if not `by_row`.

    Batches of a sample are in order of length, so that rows of every length are in both halves.
    """
    pieces, before = [], 0
    for index, batch in enumerate(batches):
        count = num_rows(batch) if by_row else None
        if count is None:
            pieces.append(Half(index, index % 2, batch, slice(None)))
            continue
        for half in (0, 1):
            rows = slice((before + half) % 2, None, 2)
            if len(range(count)[rows]):
                pieces.append(Half(index, half, {key: value[rows] for key, value in batch.items()}, rows))
        before += count
    return sorted(pieces, key=lambda piece: piece.half)
