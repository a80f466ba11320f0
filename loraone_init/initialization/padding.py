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
from torch import nn

from ..choosing.growing import SampleOrBatches, batches_of
from ..data.batches import IGNORED, Batch, is_padded, row_lengths, without_padding
from ..data.pieces import cut_rows
from ..data.sample import Sample
from ..gradients.causal_lm import CausalLM
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
) -> bool | None:
    """Whether the row with most padding has the same loss without it; a warning is logged where it has not. None: none
    of these rows is padded, so that nothing is known.

    losses: of the rows of each batch, as a pass over these batches gave them.

    Nothing is run for that, nor where only a loss function of the user's knows what is in a batch. All processes decide
    alike.
    """
    if not objective.by_row:
        return True
    row = _most_padded(batches, losses)
    if row is None:
        return None
    batch, index, beside = row
    (alone,) = without_padding(cut_rows(batch, torch.tensor([index])))
    loss, tolerance = _loss_of(stack, objective, alone), _tolerance(stack.model)
    if all(processes.gather(_is_same(loss, beside, tolerance))):
        return True
    logger.warning(
        "%s cannot be padded: the loss of a row is %.4g alone and %.4g beside a longer one; rows of one length go"
        " together, and the pass begins anew%s",
        type(stack.model).__name__,
        loss,
        beside,
        "; its loss is no causal language model's, since it sees the tokens that it is to predict"
        if type(objective) is CausalLM and _sees_ahead(stack, objective, alone, tolerance)
        else "",
    )
    return False


def unpadded(given: SampleOrBatches) -> SampleOrBatches:
    """The sample, or batches, with rows of one length together."""
    if isinstance(given, Sample):
        return replace(given, padded=False)
    return [part for batch in batches_of(given) for part in without_padding(batch)]


def _loss_of(stack: BlockStack, objective: Objective, row: Batch) -> float:
    (losses,) = stream_losses(stack, objective, [row])
    return float(losses.sums)


def _sees_ahead(stack: BlockStack, objective: Objective, row: Batch, tolerance: float) -> bool:
    """Whether the loss of all tokens but the last changes with the last."""
    ids, labels = row["input_ids"].clone(), row["labels"].clone()
    labels[:, ids.shape[1] - 1 :] = IGNORED
    if bool((labels[:, 1:] == IGNORED).all()):
        return False
    ids[:, -1] = next((token for token in ids[0].tolist() if token != ids[0, -1]), 0)  # any other
    known = {**row, "labels": labels}
    before, after = (_loss_of(stack, objective, each) for each in (known, {**known, "input_ids": ids}))
    return not _is_same(before, after, tolerance)


def _is_same(one: float, other: float, tolerance: float) -> bool:
    """False where one of them is not a number."""
    return abs(one - other) <= tolerance * abs(one)


def _tolerance(model: nn.Module) -> float:
    floating = next(tensor.dtype for tensor in model.parameters() if tensor.is_floating_point())
    return _TOLERANCES.get(floating, _TOLERANCE)


def _most_padded(batches: Sequence[Any], losses: Sequence[RowLosses]) -> tuple[Any, int, float] | None:
    """(batch, number of the row in it, loss of the row) of the row that has most of its width in padding, of those
    that have a term of the loss; None where nothing is padded.
    """
    found: tuple[float, Any, int, float] | None = None
    for batch, known in zip(batches, losses, strict=True):
        if not is_padded(batch):
            continue
        width = batch["input_ids"].shape[1] + (batch["labels"].shape[1] if batch["labels"].ndim > 1 else 1)
        for index, lengths in enumerate(row_lengths(batch)):
            padding = 1 - sum(lengths) / width
            if known.counts[index] > 0 and (found is None or padding > found[0]):
                found = padding, batch, index, float(known.sums[index])
    return None if found is None else found[1:]
