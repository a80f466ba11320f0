"""Which rows of the data are drawn, in the order of a seeded permutation."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Protocol

import torch

from ..errors import DataError
from .batches import TokenRow
from .formats import Format
from .rows import Row, Rows, quoted

logger = logging.getLogger(__name__)

_SHOWN = 10


class RowEncoder(Protocol):
    """What turns each row of one source into tokens."""

    @property
    def format(self) -> Format: ...

    def check(self, row: Row, number: int) -> None: ...

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
        """The place of a row in the permutation."""
        return self._places[id(row)]


def check_rows(rows: Rows, encoder: RowEncoder) -> None:
    """Raise DataError for the first row that does not fit the format, with how many others there are.

    All rows are looked at, drawn or not, and none is tokenised. Hub data sets, which may have millions, are not: only
    their rows that are drawn are.
    """
    if not rows.is_local:
        return
    first, others = None, 0
    for index in range(len(rows)):
        try:
            encoder.check(rows[index], index + 1)
        except DataError as error:
            first, others = (error, 0) if first is None else (first, others + 1)
    if first is not None:
        raise DataError(f"{first} ({others:,} other rows do not fit either)" if others else str(first)) from first


def draw_rows(rows: Rows, encoder: RowEncoder, samples: int, held_out: int, seed: int) -> Draw:
    """So many rows for the sample and to hold out, or what there are. No other row is tokenised."""
    draw = Draw()
    contents: set[bytes] = set()
    numbers: list[int] = []
    for place, index in _order(len(rows), seed, as_they_are=len(rows) <= samples and not held_out):
        row = encoder.encode(rows[index], index + 1)
        draw._places[id(row)] = place
        if not row.num_targets:
            draw.dropped.append(place)
            numbers.append(index + 1)
        elif len(draw.used) < samples:
            draw.used.append(row)
            contents.add(_content(row))
        elif _content(row) not in contents:
            draw.beyond.append(row)
        if len(draw.used) == samples and len(draw.beyond) == held_out:
            break
    if numbers and draw.used:
        logger.info("Dropped, since no token of them is trained on: %s", describe_numbers(numbers))
    if copies := len(draw.used) - len(contents):
        logger.info("Of the rows drawn, %d are copies of others", copies)
    return draw


def _content(row: TokenRow) -> bytes:
    """What tells a row's content from another's in 32 bytes, however long the row is."""
    return sha256(row.to_bytes()).digest()


def describe_numbers(numbers: Sequence[int]) -> str:
    """row 3; rows 3, 7 and 12; or the first ten and how many more there are."""
    shown = [str(number) for number in sorted(numbers)[:_SHOWN]]
    if len(numbers) == 1:
        return f"row {shown[0]}"
    last = shown.pop() if len(numbers) <= _SHOWN else f"{len(numbers) - _SHOWN:,} more"
    return f"rows {', '.join(shown)} and {last}"


def _order(available: int, seed: int, as_they_are: bool) -> Iterable[tuple[int, int]]:
    """(place in the seeded permutation, index) of the rows, in the order in which they are drawn."""
    permutation: list[int] = torch.randperm(available, generator=torch.Generator().manual_seed(seed)).tolist()
    permuted = enumerate(permutation)
    return sorted(permuted, key=lambda row: row[1]) if as_they_are else permuted


def divide_rows(
    used: Sequence[TokenRow], beyond: Sequence[TokenRow], held_out: int, source: str
) -> tuple[list[TokenRow], list[TokenRow]]:
    """(rows of the gradient, rows held out of it); no row of either has the content of one of the other.

    used, beyond: rows drawn for the gradient, and after them, of other content; where these are fewer than `held_out`,
    all rows are drawn. Then a quarter of all is held out, `held_out` at most, and what `beyond` lacks of them is taken
    from the end of `used`, a row with all its copies. Where nothing would be left for the gradient, none is held out.
    """
    if len(beyond) >= held_out:
        return list(used), list(beyond)
    num_rows = len(used) + len(beyond)
    missing = min(held_out, max(1, num_rows // 4)) - len(beyond)
    contents = [_content(row) for row in used]
    copies = Counter(contents)
    moved: set[bytes] = set()
    for content in reversed(contents):
        if sum(copies[other] for other in moved) >= missing:
            break
        moved.add(content)
    kept = [row for row, content in zip(used, contents, strict=True) if content not in moved]
    held = [row for row, content in zip(used, contents, strict=True) if content in moved] + list(beyond)
    if not kept:
        if not beyond:
            logger.warning(
                "%s has %d trainable row%s, of which none can be held out of the gradient: that takes two that differ",
                *(quoted(source), num_rows, "s" * (num_rows > 1)),
            )
        return list(used), list(beyond)
    logger.warning(
        "Of %d trainable rows, fewer than were asked for, %d are for the gradient and %d are held out of it",
        *(num_rows, len(kept), len(held)),
    )
    return kept, held
