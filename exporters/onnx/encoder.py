"""Encoders: hidden states of every token, or a classifier's logits, in one graph without a cache."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from .layout import GRAPH, in_dtype
from .options import DType
from .parity import Comparison, Reference, difference, sample_rows
from .session import Array, Session
from .stitch import Axes
from .trace import Traceable

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Encoder(nn.Module):
    """input_ids, attention_mask and, where the model has them, token_type_ids → one output."""

    def __init__(self, model: PreTrainedModel, output: str) -> None:
        super().__init__()
        model.config.use_cache = False  # of a classifier that is a decoder
        self.model = model
        self._output = output

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *token_type_ids: Tensor) -> tuple[Tensor]:
        types = {"token_type_ids": token_type_ids[0]} if token_type_ids else {}
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, **types)
        found: Tensor = outputs[self._output]
        return (found,)


def encoder(model: PreTrainedModel) -> Traceable:
    """last_hidden_state (batch, sequence, hidden)."""
    return _traceable(model, "last_hidden_state", ("batch_size", "sequence_length", model.config.hidden_size))


def classifier(model: PreTrainedModel) -> Traceable:
    """logits (batch, labels)."""
    return _traceable(model, "logits", ("batch_size", model.config.num_labels))


def _traceable(model: PreTrainedModel, output: str, shape: Axes) -> Traceable:
    names = ["input_ids", "attention_mask"] + ["token_type_ids"] * _has_token_types(model)

    def example(sizes: Mapping[str, int]) -> tuple[Tensor, ...]:
        batch, length = sizes["batch_size"], sizes["sequence_length"]
        generator = torch.Generator().manual_seed(0)
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[0, -1] = 0
        tokens = torch.randint(model.config.get_text_config().vocab_size, (batch, length), generator=generator)
        return (tokens, mask, torch.zeros_like(mask))[: len(names)]

    ids: Axes = ("batch_size", "sequence_length")
    return Traceable(Encoder(model, output), dict.fromkeys(names, ids), {output: shape}, example)


def _has_token_types(model: PreTrainedModel) -> bool:
    return (getattr(model.config, "type_vocab_size", None) or 0) > 1 and (
        "token_type_ids" in inspect.signature(model.forward).parameters
    )


@torch.no_grad()
def encoder_reference(model: PreTrainedModel, output: str) -> Reference:
    """The output for random rows, each alone."""
    rows = sample_rows(model)
    outputs = [model(input_ids=torch.from_numpy(row)[None])[output][0].numpy() for row in rows]
    return Reference(rows, outputs, padding=getattr(model.config, "pad_token_id", None) or 0)


def compare_encoder(directory: Path, reference: Reference, dtype: DType = "fp32") -> Comparison:
    """Differences of the output for single rows, and for a batch that is padded on the right."""
    session = Session(directory / in_dtype(GRAPH, dtype))
    (output,) = session.outputs
    alone = [session.run(_inputs([row], 0))[output][0] for row in reference.rows]
    batch = session.run(_inputs(reference.rows, reference.padding))[output]
    padded = [found[: len(row)] if found.ndim > 1 else found for found, row in zip(batch, reference.rows, strict=True)]
    return Comparison(
        {"single rows": difference(alone, reference.outputs), "padded batch": difference(padded, reference.outputs)}
    )


def _inputs(rows: Sequence[Array], padding: int) -> dict[str, Array]:
    tokens, mask = np.full((len(rows), max(map(len, rows))), padding), np.zeros((len(rows), max(map(len, rows))), int)
    for number, row in enumerate(rows):
        tokens[number, : len(row)], mask[number, : len(row)] = row, 1
    return {"input_ids": tokens, "attention_mask": mask, "token_type_ids": np.zeros_like(mask)}
