"""The objective of encoder-decoder language models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..data.batches import IGNORED
from ..errors import ModelError
from ..transformers_private import encoder_output
from .causal_lm import CausalLM
from .objective import Batch, check_tokens


class Seq2SeqLM(CausalLM):
    """Sum of the decoder's cross entropies over all label tokens, given what the encoder makes of the input.

    The decoder reads the labels shifted by one, as the model itself shifts them; each position predicts its own label.
    Positions reach the head in chunks, as in `CausalLM`.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__(model, device)
        self._shift: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)

    def check(self, batches: Sequence[Batch]) -> None:
        """Labels are tokens that the decoder reads."""
        super().check(batches)
        check_tokens(self._model, [batch["labels"] for batch in batches])

    def _inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        """With what the decoder reads, or with labels, which a model shifts on the way to its decoder."""
        labels = batch["labels"].to(self._device)
        read = {"labels": labels} if self._shift is None else {"decoder_input_ids": self._shift(labels=labels)}
        return {**super()._inputs(batch), **read}

    def _check_read(self, tokens: Any, batch: Batch) -> None:
        """Some models shift the input in the place of labels (FSMT); of others it cannot be told."""
        labels, name = batch["labels"].to(self._device), type(self._model).__name__
        if self._shift is not None:
            return
        if not isinstance(tokens, torch.Tensor) or tokens.dtype != labels.dtype:
            raise ModelError(f"it cannot be told what tokens the decoder of {name} reads; pass loss=")
        before = labels[:, :-1]
        if tokens.shape != labels.shape or bool(((tokens[:, 1:] != before) & (before != IGNORED)).any()):
            raise ModelError(f"{name} does not give its labels to its decoder, shifted by one; pass loss=")

    def _labels(self, batch: Batch) -> torch.Tensor:
        return batch["labels"]

    def _head_inputs(self, states: torch.Tensor) -> dict[str, Any]:
        """Given an encoder's output, which no one reads, the model does not run its encoder."""
        tokens = super()._head_inputs(states)["input_ids"]
        return {"decoder_input_ids": tokens, "encoder_outputs": encoder_output(states)}
