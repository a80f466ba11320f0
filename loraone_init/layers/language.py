"""Which parts of a transformers model compute language: the decoder, and what belongs to images or sound instead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def find_decoder(model: nn.Module) -> nn.Module | None:
    """The module between the embedding and the head, whose output's hidden states the head reads; None: none is known.

    What `get_decoder` gives need not be it: it may be the head itself, or hold the head.
    """
    head = output_embedding(model)

    def is_it(module: nn.Module) -> bool:
        inside = set(module.modules())
        return head not in inside and any(isinstance(part, nn.ModuleList) for part in inside)

    named = [found for found in _decoders(model) if any(isinstance(part, nn.ModuleList) for part in found.modules())]
    inside = [child for found in named for child in found.children()]  # of one that holds the head
    return next((module for module in (*named, *inside) if is_it(module)), None)


def _decoders(model: nn.Module) -> Iterator[nn.Module]:
    for start in (model, getattr(model, "base_model", None)):
        seen = [model]
        while (found := _decoder_of(start)) is not None and all(found is not module for module in seen):
            yield found
            seen.append(found)
            start = found
    base = getattr(model, "base_model", None)
    if isinstance(base, nn.Module) and base is not model:
        yield base


def _decoder_of(model: Any) -> nn.Module | None:
    getter = getattr(model, "get_decoder", None)
    found = getter() if callable(getter) else None
    return found if isinstance(found, nn.Module) else None


def output_embedding(model: nn.Module) -> nn.Module | None:
    """The layer that gives logits; None for models without one."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return head if isinstance(head, nn.Module) else None


def outside_language(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules beside the language model that have weights: vision and audio towers, their connectors.

    The language model is told by its configuration, `text_config` or another name for it, which is a part of the
    model's own. Of a model without such a part it is all but the parts with configurations of their own; of an
    encoder-decoder all but those for images and sound. () for models of text alone.
    """
    config: Any = getattr(model, "config", None)
    if not getattr(config, "sub_configs", None):
        return ()
    parts = _parts(config)
    text = type(config.get_text_config(decoder=True)) if hasattr(config, "get_text_config") else type(config)
    if text is type(config) or getattr(config, "is_encoder_decoder", False):
        kinds = {type(part) for name, part in parts if _is_of_senses(name)} - {text, type(config)}
        return _topmost(model, lambda module: type(getattr(module, "config", None)) in kinds)
    return _beside(model, lambda module: type(getattr(module, "config", None)) is text)


_SENSES = ("vision", "visual", "image", "video", "audio", "speech", "sound", "vq", "qformer", "perceiver", "tokenizer")


def _is_of_senses(name: str) -> bool:
    return any(word in name for word in _SENSES)


def _parts(config: Any) -> list[tuple[str, Any]]:
    """The configurations inside of one, and inside of those, by name."""
    found = []
    for name in getattr(config, "sub_configs", None) or ():
        part = getattr(config, name, None)
        if hasattr(part, "to_dict"):
            found += [(name, part), *((f"{name}.{inner}", value) for inner, value in _parts(part))]
    return found


def _topmost(model: nn.Module, wanted: Any) -> tuple[str, ...]:
    names: list[str] = []
    for name, module in model.named_modules():
        if name and wanted(module) and not any(name.startswith(f"{above}.") for above in names):
            names.append(name)
    return tuple(names)


def _beside(model: nn.Module, wanted: Any) -> tuple[str, ...]:
    """Names of the largest modules that neither are in a wanted one nor hold one, nor are the head."""
    inside = _topmost(model, wanted)
    if not inside:
        return ()
    head = output_embedding(model)
    names: list[str] = []
    for name, module in model.named_modules():
        holds = name == "" or any(f"{wanted_name}.".startswith(f"{name}.") for wanted_name in inside)
        is_part = any(f"{name}.".startswith(f"{above}.") for above in (*inside, *names))
        if not holds and not is_part and module is not head and next(module.parameters(), None) is not None:
            names.append(name)
    return tuple(names)
