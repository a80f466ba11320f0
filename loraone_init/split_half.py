"""A sample in two halves: which rows are in which, and how far the singular subspaces of their gradients agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .collector import LayerGradient
from .objective import RowLosses
from .ranks import num_rows
from .svd import layer_generator, truncated_svd

SUBSPACE_SINE = 1e-2
"""How accurate the halves' subspaces are: it moves a cos² by 1e-4 at most, and sampling moves it by far more."""


def split_half_agreement(gradient: LayerGradient, rank: int, seed: int) -> tuple[float, float] | None:
    """‖U₁ᵀU₂‖²_F/r and ‖V₁ᵀV₂‖²_F/r of the leading r singular vectors of what both halves give of a gradient (out, in).

    That is the mean cos² of the r principal angles on either side: the share of one subspace that lies in the other,
    from r/out (r/in) for subspaces that have nothing to do with each other to 1 for the same. It changes smoothly where
    single angles jump: the last one belongs to whatever direction is next to be found.
    None where one of the halves has a numerical rank below r, so that its subspace is not defined.
    """
    generator = layer_generator(seed, f"{gradient.name}, in halves")
    one, two = (truncated_svd(G, rank, generator=generator, tolerance=SUBSPACE_SINE) for G in gradient.parts)
    if min(one.rank, two.rank) < rank:
        return None
    output = one.U.double().T @ two.U.double()
    input_ = one.Vh.double() @ two.Vh.double().T
    return float(output.square().sum()) / rank, float(input_.square().sum()) / rank


@dataclass(frozen=True)
class Half:
    """The rows of batch number `index` that belong to one half, 0 or 1, of the sample."""

    index: int
    half: int
    batch: Any
    rows: slice


def split(batches: Sequence[Any], by_row: bool) -> list[Half]:
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


def join_losses(pieces: Sequence[Half], losses: Sequence[RowLosses]) -> list[RowLosses]:
    """The losses of the batches whose pieces these are."""
    by_batch: dict[int, list[tuple[slice, RowLosses]]] = {}
    for piece, part in zip(pieces, losses, strict=True):
        by_batch.setdefault(piece.index, []).append((piece.rows, part))
    return [_interleaved(by_batch[index]) for index in sorted(by_batch)]


def _interleaved(parts: list[tuple[slice, RowLosses]]) -> RowLosses:
    num_rows = sum(len(part.sums) for _, part in parts)
    sums, counts = (torch.zeros(num_rows, dtype=torch.float64) for _ in range(2))
    for rows, part in parts:
        sums[rows], counts[rows] = part.sums, part.counts
    return RowLosses(sums, counts)
