"""Errors of tokenizers and chat templates, which are other people's code, told by the row that brought them about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import DataError, describe, others_errors


@contextmanager
def told_by_row(number: int) -> Iterator[None]:
    """Has what a tokenizer or a template raises in here end as a DataError that names the row, from 1.

    Templates are programs: they divide by zero, recurse without end, or call what is not there. Lack of memory and our
    own errors pass.
    """
    with others_errors(lambda error: DataError(f"row {number} cannot be tokenised: {describe(error)[:250]}")):
        yield
