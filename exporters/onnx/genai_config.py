"""genai_config.json: how onnxruntime-genai runs a decoder graph of any architecture.

What the graph says of itself (inputs, layers, heads, vocabulary) is read from the graph; token ids and defaults of the
search come from the model's configurations.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from loraone_init.errors import ExportError, describe

from .layout import GENAI_CONFIG, GRAPH, in_dtype
from .options import DType

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig


logger = logging.getLogger(__name__)

_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")


@dataclass(frozen=True)
class _Decoder:
    """What the graph has: names of inputs, its layers, and the sizes of their caches."""

    inputs: frozenset[str]
    num_layers: int
    num_kv_heads: int
    head_size: int
    vocabulary: int


def write_genai_config(merged: Path, out: Path, dtype: DType = "fp32") -> bool:
    """Write genai_config.json for the decoder graph of this dtype in `out`, of the model in `merged`.

    The graph has inputs input_ids, attention_mask, position_ids (where it takes them) and past_key_values.N.key and
    .value, outputs logits and present.N.key and .value. False, and a message that says why, where onnxruntime-genai
    cannot run it: caches that are not all of one shape, no end-of-sequence token, or no length of the context.
    Raises ExportError where the model's configuration cannot be read.
    """
    try:
        config, generation = _read_configs(merged)
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(f"the configuration in {merged} cannot be read: {describe(error)}") from error
    file = in_dtype(GRAPH, dtype)
    decoder = _read_graph(out / file)
    if isinstance(decoder, str):
        logger.warning("No %s is written: %s", GENAI_CONFIG, decoder)
        return False
    if generation.eos_token_id is None:
        logger.warning("No %s is written: the model has no eos_token_id, so nothing would end", GENAI_CONFIG)
        return False
    if getattr(config, "max_position_embeddings", None) is None:
        logger.warning("No %s is written: the model's configuration has no max_position_embeddings", GENAI_CONFIG)
        return False
    content = {"model": _model(config, generation, decoder, file), "search": _search(config, generation)}
    (out / GENAI_CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return True


def _read_configs(merged: Path) -> tuple[PreTrainedConfig, GenerationConfig]:
    """The text part of the model's configuration, and that of generation, which may be made of it."""
    from transformers import AutoConfig, GenerationConfig

    config = AutoConfig.from_pretrained(merged)
    if (merged / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(merged)
    else:
        generation = GenerationConfig.from_model_config(config)
    return config.get_text_config(decoder=True), generation


def _read_graph(path: Path) -> _Decoder | str:
    """What the graph has, or why it is no decoder that onnxruntime-genai runs."""
    graph = onnx.load(path, load_external_data=False).graph
    shapes = {value.name: _shape(value) for value in (*graph.input, *graph.output)}
    caches = {name: shape for name, shape in shapes.items() if _PAST.fullmatch(name)}
    if not caches or "logits" not in shapes:
        return "the graph has no key-value cache"
    kinds = {(shape[1], shape[3]) for shape in caches.values() if len(shape) == 4}
    if len(kinds) != 1:
        return f"its layers have caches of different shapes {sorted(kinds)}"
    ((heads, head_size),) = kinds
    layers = {int(match[1]) for name in caches if (match := _PAST.fullmatch(name))}
    inputs = frozenset(value.name for value in graph.input)
    return _Decoder(inputs, len(layers), heads, head_size, shapes["logits"][-1])


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    """0 for a dimension without a fixed size."""
    return tuple(dimension.dim_value for dimension in value.type.tensor_type.shape.dim)


def _model(config: PreTrainedConfig, generation: GenerationConfig, decoder: _Decoder, file: Path) -> dict[str, Any]:
    eos = generation.eos_token_id
    first = eos[0] if isinstance(eos, list) else eos
    inputs = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in decoder.inputs}
    return {
        "type": "decoder",
        "bos_token_id": first if generation.bos_token_id is None else generation.bos_token_id,
        "eos_token_id": eos,
        "pad_token_id": first if generation.pad_token_id is None else generation.pad_token_id,
        "context_length": config.max_position_embeddings,
        "vocab_size": decoder.vocabulary,
        "decoder": {
            "filename": file.as_posix(),
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "hidden_size": config.hidden_size,
            "head_size": decoder.head_size,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": decoder.num_kv_heads,
            "num_hidden_layers": decoder.num_layers,
            "inputs": {
                **inputs,
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }


def _search(config: PreTrainedConfig, generation: GenerationConfig) -> dict[str, Any]:
    """The model's own defaults. Caches are not one buffer: the graph concatenates past and present."""
    defaults = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}
    chosen = {name: getattr(generation, name, None) for name in defaults}
    return {
        **{name: default if chosen[name] is None else chosen[name] for name, default in defaults.items()},
        "max_length": config.max_position_embeddings,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": False,
    }
