"""Rows that are held out of the gradient, so that a loss on them is that of rows which the step has not seen."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from .batches import TokenRow
from .errors import DataError

logger = logging.getLogger(__name__)

HELD_OUT = 16
"""Rows that a search for γ holds out, unless told otherwise."""


def divide_rows(
    used: Sequence[TokenRow], beyond: Sequence[TokenRow], held_out: int, source: str
) -> tuple[list[TokenRow], list[TokenRow]]:
    """(rows of the gradient, rows held out of it); no row of either has the content of one of the other.

    used, beyond: rows drawn for the gradient, and after them, of other content; where these are fewer than `held_out`,
    all rows are drawn. Then a quarter of all is held out, `held_out` at most, and what `beyond` lacks of them is taken
    from the end of `used`, a row with all its copies.

    Raises DataError where nothing would be left for the gradient.
    """
    if len(beyond) >= held_out:
        return list(used), list(beyond)
    num_rows = len(used) + len(beyond)
    missing = min(held_out, max(1, num_rows // 4)) - len(beyond)
    contents = [row.to_bytes() for row in used]
    copies = Counter(contents)
    moved: set[bytes] = set()
    for content in reversed(contents):
        if sum(copies[other] for other in moved) >= missing:
            break
        moved.add(content)
    kept = [row for row, content in zip(used, contents, strict=True) if content not in moved]
    held = [row for row, content in zip(used, contents, strict=True) if content in moved] + list(beyond)
    if not kept:
        raise DataError(
            f"{source!r} has {num_rows} trainable row{'s' * (num_rows > 1)}, of which none can be held out of the"
            " gradient; two that differ are needed at least, or hold none out (a number for --gamma)"
        )
    logger.warning(
        "Of %d trainable rows, fewer than were asked for, %d are for the gradient and %d are held out of it",
        *(num_rows, len(kept), len(held)),
    )
    return kept, held
