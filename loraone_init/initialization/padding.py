"""Whether a model can be padded: whether a row's loss is the same alone and beside longer ones.

Most can. Some make their own attention mask (CPM-Ant), attend in another way where nothing is padded (PaliGemma), or
choose among all positions (the sparse attention of DeepSeek V3.2), without regard to padding. A pass tells what a row's
loss is beside longer ones, so that one forward of one row tells the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..choosing.growing import SampleOrBatches, batches_of
from ..data.batches import is_padded, row_lengths, without_padding
from ..data.pieces import cut_rows
from ..data.sample import Sample
from ..gradients.losses import RowLosses
from ..gradients.objective import Objective
from ..gradients.stream import stream_losses
from ..processes.processes import Processes
from ..streaming.stack import BlockStack

logger = logging.getLogger(__name__)

_TOLERANCES = {torch.bfloat16: 3e-2, torch.float16: 1e-2}
_TOLERANCE = 2e-5
"""Relative differences of a row's loss that other shapes of matrices make, by far; the second in fp32 and fp64."""


def can_be_padded(
    stack: BlockStack, objective: Objective, batches: Sequence[Any], losses: Sequence[RowLosses], processes: Processes
) -> bool:
    """Whether the row with most padding has the same loss without it; a warning is logged where it has not.

    losses: of the rows of each batch, as a pass over these batches gave them.

    Nothing is run where nothing is padded, nor where only a loss function of the user's knows what is in a batch. All
    processes decide alike.
    """
    row = _most_padded(batches, losses) if objective.by_row else None
    if row is None:
        return True
    batch, index, beside = row
    (alone,) = stream_losses(stack, objective, without_padding(cut_rows(batch, torch.tensor([index]))))
    floating = next(tensor.dtype for tensor in stack.model.parameters() if tensor.is_floating_point())
    loss = float(alone.sums)
    is_same = abs(loss - beside) <= _TOLERANCES.get(floating, _TOLERANCE) * abs(loss)  # False where one is NaN
    if all(processes.gather(is_same)):
        return True
    logger.warning(
        "%s cannot be padded: the loss of a row is %.4g alone and %.4g beside a longer one; rows of one length go"
        " together, and the pass begins anew",
        type(stack.model).__name__,
        loss,
        beside,
    )
    return False


def unpadded(given: SampleOrBatches) -> SampleOrBatches:
    """The sample, or batches, with rows of one length together."""
    if isinstance(given, Sample):
        return replace(given, padded=False)
    return [part for batch in batches_of(given) for part in without_padding(batch)]


def _most_padded(batches: Sequence[Any], losses: Sequence[RowLosses]) -> tuple[Any, int, float] | None:
    """(batch, number of the row in it, loss of the row) of the row that has most of its width in padding, of those
    that have a term of the loss; None where nothing is padded.
    """
    found: tuple[float, Any, int, float] | None = None
    for batch, known in zip(batches, losses, strict=True):
        if not is_padded(batch):
            continue
        width = batch["input_ids"].shape[1] + batch["labels"].shape[-1]
        for index, lengths in enumerate(row_lengths(batch)):
            padding = 1 - sum(lengths) / width
            if known.counts[index] > 0 and (found is None or padding > found[0]):
                found = padding, batch, index, float(known.sums[index])
    return None if found is None else found[1:]
