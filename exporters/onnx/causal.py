"""Text generation: one graph for prefill and for decoding with a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor, nn

from loraone_init.errors import ExportError

from .calls import filled_cache, layer_states
from .layout import GRAPH, in_dtype
from .options import DType
from .parity import NUM_TOKENS, Comparison, Reference, difference, sample_rows
from .session import Array, Session, causal_inputs, greedy, next_cache
from .stitch import Axes
from .trace import Traceable

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel


Side = Literal["left", "right"]


class CausalLM(nn.Module):
    """Prefill and cached decoding: input_ids, attention_mask, position_ids, past → logits, present."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        states = {slot: (past[2 * slot], past[2 * slot + 1]) for slot in range(len(past) // 2)}
        cache: DynamicCache = filled_cache(states)
        logits = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).logits
        return (logits, *(state for slot in states for state in layer_states(cache, slot)))


def causal_lm(model: PreTrainedModel) -> Traceable:
    """Cached keys and values (batch, heads, past, dim) in order of layers; positions count from the first real token.

    Raises ExportError for a model whose layers keep something else than keys and values.
    """
    vocabulary, caches = model.config.get_text_config().vocab_size, cache_shapes(model)
    ids: Axes = ("batch_size", "sequence_length")
    inputs: dict[str, Axes] = {
        "input_ids": ids,
        "attention_mask": ("batch_size", "total_sequence_length"),
        "position_ids": ids,
    }
    outputs: dict[str, Axes] = {"logits": (*ids, vocabulary)}
    for slot, shapes in enumerate(caches):
        for kind, (heads, dim) in zip(("key", "value"), shapes, strict=True):
            inputs[f"past_key_values.{slot}.{kind}"] = ("batch_size", heads, "past_sequence_length", dim)
            outputs[f"present.{slot}.{kind}"] = ("batch_size", heads, "total_sequence_length", dim)

    def example(sizes: Mapping[str, int]) -> tuple[Tensor, ...]:
        batch, new, past = sizes["batch_size"], sizes["sequence_length"], sizes["past_sequence_length"]
        generator = torch.Generator().manual_seed(0)
        mask = torch.ones(batch, past + new, dtype=torch.long)
        mask[0, 0] = 0
        states = [
            torch.randn(batch, heads, past, dim, generator=generator, dtype=model.dtype)
            for shapes in caches
            for heads, dim in shapes
        ]
        tokens = torch.randint(vocabulary, (batch, new), generator=generator)
        return tokens, mask, (mask.cumsum(1) - 1).clamp(min=0)[:, past:], *states

    return Traceable(CausalLM(model), inputs, outputs, example)


@torch.no_grad()
def cache_shapes(model: PreTrainedModel) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Heads and dimension of each layer's keys and of its values. Raises ExportError where a layer keeps others."""
    cache = filled_cache({})
    try:
        model(input_ids=torch.ones(1, 2, dtype=torch.long), past_key_values=cache, use_cache=True)
        states = [layer_states(cache, slot) for slot in range(len(cache.layers))]
        shapes = [((key.shape[1], key.shape[3]), (value.shape[1], value.shape[3])) for key, value in states]
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise _other_states(model) from error
    if not shapes:
        raise _other_states(model)
    return shapes


def _other_states(model: PreTrainedModel) -> ExportError:
    return ExportError(
        f"{type(model).__name__} keeps other states than keys and values, which the torch engine does not export; try"
        " --engine genai, which knows some architectures by name"
    )


@torch.no_grad()
def causal_reference(model: PreTrainedModel, prompt: Sequence[int], num_tokens: int = NUM_TOKENS) -> Reference:
    """Logits of random rows, and the greedy continuation of `prompt`, computed anew for every token."""
    rows = sample_rows(model)
    outputs = [model(input_ids=torch.from_numpy(row)[None], use_cache=False).logits[0].numpy() for row in rows]
    tokens = list(prompt)
    for _ in range(num_tokens):
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
    return Reference(rows, outputs, prompt=list(prompt), tokens=tokens[len(prompt) :])


def compare_causal(
    directory: Path, reference: Reference, dtype: DType = "fp32", *, side: Side = "left", adapter: Path | None = None
) -> Comparison:
    """Logits in prefill, in cached decoding, and in a batch that is padded on one side; and greedy tokens.

    adapter: an .onnx_adapter file for a graph that takes one.
    """
    session = Session(directory / in_dtype(GRAPH, dtype), adapter)
    compared = {
        "prefill": difference([_prefill(session, row) for row in reference.rows], reference.outputs),
        "cached decoding": difference([_decode(session, row) for row in reference.rows], reference.outputs),
        f"{side}-padded batch": difference(_padded(session, reference.rows, side), reference.outputs),
    }
    return Comparison(compared, greedy(session, reference.prompt, len(reference.tokens)))


def _prefill(session: Session, row: Array) -> Array:
    inputs = causal_inputs(row[None], np.ones((1, len(row)), np.int64))
    logits: Array = session.run(inputs | session.empty_cache(1))["logits"][0]
    return logits


def _decode(session: Session, row: Array) -> Array:
    """A third at once, three tokens at once, and eight of the rest one by one; then the others at once."""
    start = len(row) // 3
    cuts = [0, start, start + 3, *range(start + 4, start + 10), len(row)]
    cache, logits = session.empty_cache(1), []
    for begin, end in pairwise(cuts):
        if begin < end:
            outputs = session.run(causal_inputs(row[None, begin:end], np.ones((1, end), np.int64)) | cache)
            cache = next_cache(outputs)
            logits.append(outputs["logits"][0])
    return np.concatenate(logits)


def _padded(session: Session, rows: Sequence[Array], side: Side) -> list[Array]:
    """All rows in one batch; where it is padded on the left, the last tokens are decoded with the cache."""
    length = max(map(len, rows))
    tokens, mask = np.zeros((len(rows), length), np.int64), np.zeros((len(rows), length), np.int64)
    places = [slice(length - len(row), length) if side == "left" else slice(len(row)) for row in rows]
    for number, (row, place) in enumerate(zip(rows, places, strict=True)):
        tokens[number, place], mask[number, place] = row, 1
    cuts = [0, length - 1, length] if side == "left" else [0, length]
    cache, logits = session.empty_cache(len(rows)), []
    for begin, end in pairwise(cuts):
        outputs = session.run(causal_inputs(tokens[:, begin:end], mask[:, :end]) | cache)
        cache = next_cache(outputs)
        logits.append(outputs["logits"])
    together = np.concatenate(logits, axis=1)
    return [together[number, place] for number, place in enumerate(places)]
