"""Which rows of the data are drawn, in the order of a seeded permutation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from .batches import TokenRow
from .formats import Format
from .rows import Row, Rows


class RowEncoder(Protocol):
    """What turns each row of one source into tokens."""

    @property
    def format(self) -> Format: ...

    def encode(self, row: Row, number: int) -> TokenRow: ...


@dataclass
class Draw:
    """used: rows of the sample; beyond: those of other content after them, to be held out.

    dropped: places in the permutation of rows without a token to train on.
    """

    used: list[TokenRow] = field(default_factory=list)
    beyond: list[TokenRow] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    _places: dict[int, int] = field(default_factory=dict)  # by the row's id: equal rows have several

    def place(self, row: TokenRow) -> int:
        """Of one of these rows in the permutation."""
        return self._places[id(row)]


def draw_rows(rows: Rows, encoder: RowEncoder, samples: int, held_out: int, seed: int) -> Draw:
    """So many rows for the sample and to hold out, or what there are. No other row is tokenised."""
    draw = Draw()
    contents: set[bytes] = set()
    for place, index in _order(len(rows), seed, as_they_are=len(rows) <= samples and not held_out):
        row = encoder.encode(rows[index], index + 1)
        draw._places[id(row)] = place
        if not row.num_targets:
            draw.dropped.append(place)
        elif len(draw.used) < samples:
            draw.used.append(row)
            contents.add(row.to_bytes())
        elif row.to_bytes() not in contents:
            draw.beyond.append(row)
        if len(draw.used) == samples and len(draw.beyond) == held_out:
            break
    return draw


def _order(available: int, seed: int, as_they_are: bool) -> Iterable[tuple[int, int]]:
    """(place in the seeded permutation, index) of the rows, in the order in which they are drawn."""
    permutation: list[int] = torch.randperm(available, generator=torch.Generator().manual_seed(seed)).tolist()
    permuted = enumerate(permutation)
    return sorted(permuted, key=lambda row: row[1]) if as_they_are else permuted
