"""Encoder-decoders: an encoder graph, and one decoder graph for the first token and those after it.

The decoder computes keys and values of the encoder's output for as many positions as it is not given them for: for all
at the first token, for none after that. It has no branches, which quantizers would not look into.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from .calls import filled_cache, layer_states
from .layout import GRAPH, in_dtype
from .options import DType
from .parity import NUM_TOKENS, Comparison, Reference, difference, sample_rows
from .session import Array, Session, next_cache
from .stitch import Axes
from .trace import Traceable

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel


ENCODER = GRAPH.with_name("encoder_model.onnx")
DECODER = GRAPH.with_name("decoder_model_merged.onnx")
_ENCODER_IDS: Axes = ("batch_size", "encoder_sequence_length")
_DECODER_TOKENS = 9  # of the rows that are compared


class _Encoder(nn.Module):
    """input_ids, attention_mask → last_hidden_state."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        hidden: Tensor = self.model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)[0]
        return (hidden,)


class _Decoder(nn.Module):
    """input_ids, encoder_attention_mask, encoder_hidden_states, past → logits, present.

    Past and present are keys and values of the decoder's own tokens, then those of the encoder's output.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, mask: Tensor, hidden: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        own, before = _caches(past[: len(past) // 2]), past[len(past) // 2 :]
        more = self._more(input_ids, mask, hidden, before)
        cross = _caches([torch.cat(both, dim=2) for both in zip(before, more, strict=True)])
        unused = torch.zeros_like(hidden)  # the keys and values for it are there
        logits = _decode(self.model, input_ids, unused, mask, own, cross)
        return (logits, *_all_states(own), *_all_states(cross))

    def _more(self, input_ids: Tensor, mask: Tensor, hidden: Tensor, before: Sequence[Tensor]) -> list[Tensor]:
        """Keys and values of the positions after those of `before`. All else of this run is left out of the graph."""
        start, cross = before[0].shape[2], filled_cache({})
        _decode(self.model, input_ids[:, :1], hidden[:, start:], mask[:, start:], filled_cache({}), cross)
        return _all_states(cross)


def _all_states(cache: DynamicCache) -> list[Tensor]:
    return [state for slot in range(len(cache.layers)) for state in layer_states(cache, slot)]


def _caches(states: Sequence[Tensor]) -> DynamicCache:
    return filled_cache({slot: (states[2 * slot], states[2 * slot + 1]) for slot in range(len(states) // 2)})


def _decode(
    model: PreTrainedModel, tokens: Tensor, hidden: Tensor, mask: Tensor, own: DynamicCache, cross: DynamicCache
) -> Tensor:
    from transformers import EncoderDecoderCache
    from transformers.modeling_outputs import BaseModelOutput

    logits: Tensor = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
        attention_mask=mask,
        decoder_input_ids=tokens,
        past_key_values=EncoderDecoderCache(own, cross),
        use_cache=True,
    ).logits
    return logits


def seq2seq_encoder(model: PreTrainedModel) -> Traceable:
    outputs: dict[str, Axes] = {"last_hidden_state": (*_ENCODER_IDS, model.config.hidden_size)}

    def example(sizes: Mapping[str, int]) -> tuple[Tensor, ...]:
        shape = sizes["batch_size"], sizes["encoder_sequence_length"]
        return _random_tokens(model, shape), _mask(*shape)

    inputs = {"input_ids": _ENCODER_IDS, "attention_mask": _ENCODER_IDS}
    return Traceable(_Encoder(model), inputs, outputs, example)


def seq2seq_decoder(model: PreTrainedModel) -> Traceable:
    hidden: dict[str, Axes] = {"encoder_hidden_states": (*_ENCODER_IDS, model.config.hidden_size)}
    past = _states("past_key_values.{}.decoder.{}", model, "past_sequence_length")
    past |= _states("past_key_values.{}.encoder.{}", model, "past_encoder_length")
    ids: Axes = ("batch_size", "sequence_length")
    outputs: dict[str, Axes] = {"logits": (*ids, model.config.vocab_size)}
    outputs |= _states("present.{}.decoder.{}", model, "total_sequence_length")
    outputs |= _states("present.{}.encoder.{}", model, "encoder_sequence_length")

    def example(sizes: Mapping[str, int]) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        floats = (
            torch.randn([sizes[axis] if isinstance(axis, str) else axis for axis in shape], generator=generator)
            for shape in (*hidden.values(), *past.values())
        )
        mask = _mask(sizes["batch_size"], sizes["encoder_sequence_length"])
        return _random_tokens(model, (sizes["batch_size"], sizes["sequence_length"])), mask, *floats

    inputs = {"input_ids": ids, "encoder_attention_mask": _ENCODER_IDS, **hidden, **past}
    return Traceable(_Decoder(model), inputs, outputs, example)


@torch.no_grad()
def _states(name: str, model: PreTrainedModel, length: str) -> dict[str, Axes]:
    """Names and axes of keys and values in every decoder layer, as its own and those for the encoder are alike."""
    own, tokens = filled_cache({}), torch.zeros(1, 2, dtype=torch.long)
    hidden = torch.zeros(1, 2, model.config.hidden_size)
    _decode(model, tokens, hidden, torch.ones_like(tokens), own, filled_cache({}))
    return {
        name.format(slot, kind): ("batch_size", state.shape[1], length, state.shape[3])
        for slot in range(len(own.layers))
        for kind, state in zip(("key", "value"), layer_states(own, slot), strict=True)
    }


def _random_tokens(model: PreTrainedModel, shape: tuple[int, int]) -> Tensor:
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def _mask(batch: int, length: int) -> Tensor:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, -1] = 0
    return mask


@torch.no_grad()
def seq2seq_reference(model: PreTrainedModel, prompt: Sequence[int]) -> Reference:
    """Logits of the same decoder tokens for random encoder rows, and the greedy answer to `prompt`."""
    rows, tokens = sample_rows(model), torch.from_numpy(_decoder_tokens(model.config.vocab_size))
    outputs = [model(input_ids=torch.from_numpy(row)[None], decoder_input_ids=tokens).logits[0].numpy() for row in rows]
    start = model.generation_config.decoder_start_token_id or model.config.decoder_start_token_id or 0
    answer = [start]
    for _ in range(NUM_TOKENS):
        logits = model(input_ids=torch.tensor([list(prompt)]), decoder_input_ids=torch.tensor([answer])).logits
        answer.append(int(logits[0, -1].argmax()))
    return Reference(rows, outputs, prompt=list(prompt), tokens=answer[1:], start=start)


def _decoder_tokens(vocabulary: int) -> Array:
    return np.random.default_rng(1).integers(0, vocabulary, (1, _DECODER_TOKENS))


def compare_seq2seq(directory: Path, reference: Reference, dtype: DType = "fp32") -> Comparison:
    """Logits of single rows at once and token by token, and of a batch with encoder rows padded; greedy tokens."""
    encoder, decoder = (Session(directory / in_dtype(path, dtype)) for path in (ENCODER, DECODER))
    tokens = _decoder_tokens(reference.outputs[0].shape[-1])
    whole, single = [0, _DECODER_TOKENS], [0, 2, *range(3, _DECODER_TOKENS + 1)]
    rows = [_answer(encoder, decoder, [row], tokens, whole)[0] for row in reference.rows]
    cached = [_answer(encoder, decoder, [row], tokens, single)[0] for row in reference.rows]
    padded = _answer(encoder, decoder, reference.rows, tokens.repeat(len(reference.rows), 0), single)
    greedy = [reference.start]
    for _ in reference.tokens:
        logits = _answer(encoder, decoder, [np.array(reference.prompt)], np.array([greedy]), [*range(len(greedy) + 1)])
        greedy.append(int(logits[0, -1].argmax()))
    compared = {"prefill": rows, "cached decoding": cached, "padded batch": list(padded)}
    return Comparison({name: difference(found, reference.outputs) for name, found in compared.items()}, greedy[1:])


def _answer(encoder: Session, decoder: Session, rows: Sequence[Array], tokens: Array, cuts: Sequence[int]) -> Array:
    """The decoder's logits for `tokens` (batch, length), which it gets cut into pieces."""
    length = max(map(len, rows))
    ids, mask = np.zeros((len(rows), length), np.int64), np.zeros((len(rows), length), np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
    hidden = encoder.run({"input_ids": ids, "attention_mask": mask})["last_hidden_state"]
    given = {"encoder_attention_mask": mask, "encoder_hidden_states": hidden}
    cache, logits = decoder.empty_cache(len(rows)), []
    for begin, end in pairwise(cuts):
        outputs = decoder.run({"input_ids": tokens[:, begin:end]} | given | cache)
        cache = next_cache(outputs)
        logits.append(outputs["logits"])
    return np.concatenate(logits, axis=1)
