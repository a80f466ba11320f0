"""Rows of a trainer's own data, as its own collator makes batches of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ..config import AUTO, Auto
from ..data.options import HELD_OUT
from ..errors import DataError


def draw_batches(
    loader: Any, samples: int, gamma: float | Auto, batch_size: int, seed: int
) -> tuple[list[Any], list[Any]]:
    """(batches for the gradient, batches held out) of rows drawn by a seeded permutation, each kind by length.

    Neither the loader's order nor any random generator is moved on by it. For "auto", 8 rows are held out, or a
    quarter of all where there are few.

    Raises DataError where rows cannot be drawn by their number.
    """
    rows = loader.dataset
    if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        raise DataError(
            f"the training data are a {type(rows).__name__}, of which rows cannot be drawn; pass data= to the callback,"
            " such as a list of batches"
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = min(HELD_OUT, len(rows) // 4) if gamma == AUTO else 0
    used = order[: max(1, min(samples, len(rows) - held_out))]
    beyond = order[len(used) : len(used) + held_out]
    with _kept_generators():
        drawn = [sorted((rows[index] for index in indices), key=_length) for indices in (used, beyond)]
        batches = [
            [loader.collate_fn(part[i : i + batch_size]) for i in range(0, len(part), batch_size)] for part in drawn
        ]
    return batches[0], batches[1]


def _length(row: Any) -> int:
    ids = row.get("input_ids") if isinstance(row, Mapping) else None
    return len(ids) if isinstance(ids, (Sequence, torch.Tensor)) else 0


@contextmanager
def _kept_generators() -> Iterator[None]:
    """What data sets and collators draw in here leaves no trace."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
