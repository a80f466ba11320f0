"""The objective of encoder-decoder language models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
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
        if self._decoder is None:
            raise ModelError(f"the decoder of {type(model).__name__} cannot be told; pass loss=")

    def check(self, batches: Sequence[Batch]) -> None:
        """Labels are tokens that the decoder reads."""
        super().check(batches)
        check_tokens(self._model, [batch["labels"] for batch in batches])

    def _inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        """With what the decoder reads, or with labels, which a model shifts on the way to its decoder."""
        labels = batch["labels"].to(self._device)
        read = {"labels": labels} if self._shift is None else {"decoder_input_ids": self._shift(labels=labels)}
        return {**super()._inputs(batch), **read}

    def _labels(self, batch: Batch) -> torch.Tensor:
        return batch["labels"]

    def _head_inputs(self, states: torch.Tensor) -> dict[str, Any]:
        """Given an encoder's output, which no one reads, the model does not run its encoder."""
        from transformers.modeling_outputs import BaseModelOutput

        encoded = BaseModelOutput(last_hidden_state=states)
        return {"decoder_input_ids": super()._head_inputs(states)["input_ids"], "encoder_outputs": encoded}
