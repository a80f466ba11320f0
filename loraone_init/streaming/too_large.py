"""Out of memory, as something that can be answered with smaller micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import is_out_of_memory


class TooLargeError(Exception):
    """Memory did not suffice for the micro-batch of this index, in this block (None: outside of all)."""

    def __init__(self, index: int, block: int | None) -> None:
        super().__init__(f"micro-batch {index} is too large")
        self.index = index
        self.block = block


@contextmanager
def watched(index: int, block: int | None) -> Iterator[None]:
    """Raises TooLargeError where memory runs out inside."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if is_out_of_memory(error):
            raise TooLargeError(index, block) from error
        raise
