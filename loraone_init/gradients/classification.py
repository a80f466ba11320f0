"""The objective of sequence classifiers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from ..data.labels import Labels, Problem
from ..errors import DataError, ModelError
from ..layers.patching import only_last_states
from ..layers.sizes import text_config
from .losses import RowLosses
from .objective import Batch, check_tokens, model_runs


class SequenceClassification:
    """Sum over rows of the loss that transformers' models take: see `row_losses`."""

    by_row = True

    def __init__(self, model: nn.Module, device: torch.device, labels: Labels) -> None:
        self._model = model
        self._device = device
        self._labels = labels
        self._pad_id: int | None = getattr(text_config(model), "pad_token_id", None)

    def check(self, batches: Sequence[Batch]) -> None:
        for number, batch in enumerate(batches, 1):
            lacking = [key for key in ("input_ids", "labels") if not isinstance(batch, Mapping) or key not in batch]
            if lacking:
                raise DataError(f"batch {number} has no {' and no '.join(lacking)}; or pass loss=")
        check_tokens(self._model, [batch["input_ids"] for batch in batches])
        if self._pad_id is None and max(len(batch["input_ids"]) for batch in batches) > 1:
            raise ModelError("the model names no padding token; set config.pad_token_id, or use batches of one row")

    def active(self) -> AbstractContextManager[None]:
        return only_last_states(self._model)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits (rows, outputs)."""
        inputs = {key: value.to(self._device) for key, value in batch.items() if key != "labels"}
        if self._pad_id is not None and "attention_mask" in inputs:
            padding = inputs["attention_mask"] == 0  # models pool where their own padding token begins
            inputs["input_ids"] = inputs["input_ids"].masked_fill(padding, self._pad_id)
        with model_runs(self._model):
            logits: torch.Tensor = self._model(**inputs, return_dict=True).logits
        return logits

    def finish(self, features: torch.Tensor, batch: Batch, *, backward: bool, retain_graph: bool = True) -> RowLosses:
        losses = row_losses(features, batch["labels"].to(self._device), self._labels.problem)
        if backward and losses.requires_grad:
            torch.autograd.backward(losses.sum(), retain_graph=retain_graph)
        return RowLosses(losses.detach().cpu().double(), torch.ones(len(losses), dtype=torch.float64))


def row_losses(logits: torch.Tensor, labels: torch.Tensor, problem: Problem) -> torch.Tensor:
    """The loss of each row (rows,), in fp32 or better; their mean is what transformers minimises.

    Cross entropy of logits (rows, outputs) with labels (rows,); with labels (rows, outputs), the mean over outputs of
    the binary cross entropies or, in a regression, of the squared errors.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if problem == "single_label_classification":
        return cross_entropy(logits, labels, reduction="none")
    loss = mse_loss if problem == "regression" else binary_cross_entropy_with_logits
    return loss(logits, labels.to(logits.dtype).view_as(logits), reduction="none").mean(1)
