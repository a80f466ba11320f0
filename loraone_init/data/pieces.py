"""Batches cut by rows, for each of the three reasons there are: two halves of a sample whose gradients are compared,
shares of several processes, and micro-batches that turned out not to fit in memory.

Batches become pieces once (`whole_batches`). Whatever cuts them further gives pieces again, which know the rows that
they hold, so that the losses of these rows find their places in the end (`gradients.losses.join_losses`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Piece:
    """Some rows of one batch, or all of them.

    batch_index: the number of the batch in the sample.
    content:     a batch that consists of these rows: what the model is run on.
    rows:        the numbers of these rows in the batch; None for a whole batch that cannot be divided by rows.
    half:        the half of the sample, 0 or 1, that these rows belong to; 0 where the sample is not split.
    """

    batch_index: int
    content: Any
    rows: range | None
    half: int = 0

    @property
    def num_rows(self) -> int:
        """How many rows can be told apart: 1 for a batch that cannot be divided."""
        return 1 if self.rows is None else len(self.rows)

    @property
    def num_tokens(self) -> int:
        """Tokens with padding; 1 where the batch is not a mapping with a tensor input_ids."""
        ids = self.content.get("input_ids") if isinstance(self.content, Mapping) else None
        return ids.numel() if isinstance(ids, torch.Tensor) else 1

    def cut(self, rows: slice) -> Piece:
        """The piece that holds these of the rows, counted within the piece."""
        assert self.rows is not None, "a batch that cannot be divided has been cut"
        return replace(self, content=cut_rows(self.content, rows), rows=self.rows[rows])

    def without_content(self) -> Piece:
        """What other processes need to know of the piece."""
        return replace(self, content=None)


def cut_rows(batch: Mapping[str, torch.Tensor], rows: slice | torch.Tensor) -> dict[str, torch.Tensor]:
    """The batch that consists of these rows of `batch`, a slice of them or their numbers."""
    return {key: value[rows] for key, value in batch.items()}


def whole_batches(batches: Iterable[Any], by_row: bool) -> list[Piece]:
    """All batches of a sample as pieces, none of which has been cut.

    by_row: whether the loss of a batch is the sum of its rows' losses; only then may batches be divided.
    """
    return [Piece(index, batch, _divisible_rows(batch) if by_row else None) for index, batch in enumerate(batches)]


def _divisible_rows(batch: Any) -> range | None:
    """The rows of a mapping whose values are all tensors with as many rows as its input_ids; None for anything else."""
    if not (isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), torch.Tensor)):
        return None
    num_rows = len(batch["input_ids"])
    alike = all(isinstance(t, torch.Tensor) and t.ndim and len(t) == num_rows for t in batch.values())
    return range(num_rows) if alike else None


def split_in_halves(pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces of both halves of a sample, all of the first half before the second.

    Rows alternate between the halves, or whole batches where these cannot be divided. Batches of a sample are in order
    of length, so that rows of every length are in both halves.
    """
    halves: tuple[list[Piece], list[Piece]] = ([], [])
    rows_before = 0
    for piece in pieces:
        if piece.rows is None:
            halves[piece.batch_index % 2].append(replace(piece, half=piece.batch_index % 2))
            continue
        for half in (0, 1):
            rows = slice((rows_before + half) % 2, None, 2)
            if piece.rows[rows]:
                halves[half].append(replace(piece.cut(rows), half=half))
        rows_before += piece.num_rows
    return [*halves[0], *halves[1]]


def shares_of(pieces: Sequence[Piece], num_processes: int) -> list[list[Piece]]:
    """What each process takes of the pieces: consecutive rows, with as many tokens as the others within a row.

    A row (or a batch that cannot be divided) belongs to the process into whose share of all tokens, padding included,
    its middle falls. A share can be empty.
    """
    shares: list[list[Piece]] = [[] for _ in range(num_processes)]
    total, before = sum(piece.num_tokens for piece in pieces), 0.0
    for piece in pieces:
        tokens = piece.num_tokens // piece.num_rows
        middles = (before + (row + 0.5) * tokens for row in range(piece.num_rows))
        owners = [int(middle * num_processes / total) for middle in middles]
        before += piece.num_tokens
        for process in sorted(set(owners)):
            first, count = owners.index(process), owners.count(process)
            whole = count == piece.num_rows
            shares[process].append(piece if whole else piece.cut(slice(first, first + count)))
    return shares


def halve_until_below(piece: Piece, num_tokens: int) -> list[Piece]:
    """The piece, halved as often as its parts have `num_tokens` or more and consist of several rows."""
    if piece.num_rows < 2 or piece.num_tokens < num_tokens:
        return [piece]
    middle = (piece.num_rows + 1) // 2
    halves = piece.cut(slice(middle)), piece.cut(slice(middle, None))
    return [part for half in halves for part in halve_until_below(half, num_tokens)]
