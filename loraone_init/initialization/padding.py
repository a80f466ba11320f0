"""Whether a model can be padded: whether a row's loss is the same alone and beside longer ones.

Most can. Some make their own attention mask (CPM-Ant), attend in another way where nothing is padded (PaliGemma), or
choose among all positions (the sparse attention of DeepSeek V3.2), without regard to padding.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..choosing.growing import batches_of
from ..data.batches import Batch, is_padded, row_lengths, without_padding
from ..data.pieces import cut_rows
from ..data.sample import Sample
from ..gradients.objective import Objective
from ..gradients.stream import stream_losses
from ..processes.processes import Processes
from ..streaming.stack import BlockStack

logger = logging.getLogger(__name__)

_NUM_ROWS = 3

_TOLERANCES = {torch.bfloat16: 3e-2, torch.float16: 1e-2}
_TOLERANCE = 2e-5
"""Relative differences of a row's loss that other shapes of matrices make, by far; the second in fp32 and fp64."""


def unpadded_where_needed(
    stack: BlockStack,
    objective: Objective,
    given: Sample | list[Any],
    held_out: Sequence[Any],
    processes: Processes,
) -> tuple[Sample | list[Any], list[Any]]:
    """The sample and the batches held out, with rows of one length together where the model cannot be padded.

    Tried with a few rows, in one forward; not at all where nothing is padded, or only a loss function of the user's
    knows what is in a batch. A warning tells of it. All processes decide alike.
    """
    batches = [*batches_of(given), *held_out]
    padded = [batch for batch in batches if is_padded(batch)] if objective.by_row else []
    if not padded:
        return given, [*held_out]
    alone, beside = _losses(stack, objective, max(padded, key=_share_of_padding))
    floating = next(tensor.dtype for tensor in stack.model.parameters() if tensor.is_floating_point())
    tolerance = _TOLERANCES.get(floating, _TOLERANCE)
    differs = not bool(((alone - beside).abs() <= tolerance * alone.abs()).all())  # nor where one is NaN
    if not any(processes.gather(differs)):
        return given, [*held_out]
    logger.warning(
        "%s cannot be padded: the loss of a row is %.4g alone and %.4g beside a longer one; rows of one length go"
        " together",
        type(stack.model).__name__,
        alone[0],
        beside[0],
    )
    unpadded = [part for batch in held_out for part in without_padding(batch)]
    if isinstance(given, Sample):
        return replace(given, padded=False), unpadded
    return [part for batch in given for part in without_padding(batch)], unpadded


def _losses(stack: BlockStack, objective: Objective, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed losses of the shortest rows of a batch, each run alone, and together with the longest."""
    lengths = row_lengths(batch)
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    short = order[: min(_NUM_ROWS, max(1, len(order) - 1))]
    alone = [without_padding(cut_rows(batch, torch.tensor([row])))[0] for row in short]
    beside = cut_rows(batch, torch.tensor([*short, order[-1]]))
    *found, together = stream_losses(stack, objective, [*alone, beside])
    return torch.cat([rows.sums for rows in found]), together.sums[: len(short)]


def _share_of_padding(batch: Batch) -> float:
    """Of the row that has most of it."""
    return 1 - min(tokens for tokens, _ in row_lengths(batch)) / batch["input_ids"].shape[1]
