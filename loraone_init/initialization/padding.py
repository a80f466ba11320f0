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
from torch import nn

from ..choosing.growing import batches_of
from ..data.batches import IGNORED, Batch, is_padded, row_lengths, without_padding
from ..data.pieces import cut_rows
from ..data.sample import Sample
from ..gradients.causal_lm import CausalLM
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
    rows, beside = _shortest_and_longest(max(padded, key=_share_of_padding))
    *found, together = stream_losses(stack, objective, [*rows, beside])
    pairs = list(zip((float(losses.sums) for losses in found), together.sums.tolist(), strict=False))
    tolerance = _tolerance(stack.model)
    differing = next((pair for pair in pairs if _differ(*pair, tolerance)), None)
    if not any(processes.gather(differing is not None)):
        return given, [*held_out]
    logger.warning(
        "%s cannot be padded: the loss of a row is %.4g alone and %.4g beside a longer one; rows of one length go"
        " together%s",
        type(stack.model).__name__,
        *(differing or pairs[0]),
        "; its loss is no causal language model's, since it sees the tokens that it is to predict"
        if type(objective) is CausalLM and _sees_ahead(stack, objective, rows[-1], tolerance)
        else "",
    )
    unpadded = [part for batch in held_out for part in without_padding(batch)]
    if isinstance(given, Sample):
        return replace(given, padded=False), unpadded
    return [part for batch in given for part in without_padding(batch)], unpadded


def _shortest_and_longest(batch: Batch) -> tuple[list[Batch], Batch]:
    """The shortest rows of a batch, each by itself without padding, and a batch of them and of the longest."""
    lengths = row_lengths(batch)
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    short = order[: min(_NUM_ROWS, max(1, len(order) - 1))]
    alone = [without_padding(cut_rows(batch, torch.tensor([row])))[0] for row in short]
    return alone, cut_rows(batch, torch.tensor([*short, order[-1]]))


def _sees_ahead(stack: BlockStack, objective: Objective, row: Batch, tolerance: float) -> bool:
    """Whether the loss of all tokens but the last changes with the last."""
    ids, labels = row["input_ids"].clone(), row["labels"].clone()
    labels[:, ids.shape[1] - 1 :] = IGNORED
    ids[:, -1] = next((token for token in ids[0].tolist() if token != ids[0, -1]), 0)  # any other
    known = {**row, "labels": labels}
    before, after = stream_losses(stack, objective, [known, {**known, "input_ids": ids}])
    return _differ(float(before.sums), float(after.sums), tolerance)


def _differ(one: float, other: float, tolerance: float) -> bool:
    """Also where one of them is no number."""
    return not abs(one - other) <= tolerance * abs(one)


def _tolerance(model: nn.Module) -> float:
    floating = next(tensor.dtype for tensor in model.parameters() if tensor.is_floating_point())
    return _TOLERANCES.get(floating, _TOLERANCE)


def _share_of_padding(batch: Batch) -> float:
    """Of the row that has most of it."""
    return 1 - min(tokens for tokens, _ in row_lengths(batch)) / batch["input_ids"].shape[1]
