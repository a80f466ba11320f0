"""The factors of fused experts: PEFT's `target_parameters`, one stack of all experts' factors for a parameter.

Where PEFT wraps a module for several parameters, the factors of the last are at the module's own path, those of the one
before at `<module>.base_layer`, and so on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from loraone_init.adapter.peft_config import scale_of
from loraone_init.errors import ExportError
from loraone_init.linalg.factors import LoraPair

from .lora_weights import ExpertWeights, LoraWeights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def separate_experts(model: PreTrainedModel, lora: LoraWeights) -> LoraWeights:
    """The same factors, with those of the model's fused parameters in `experts` instead of `pairs`.

    Raises ExportError where they do not fit the model's parameters.
    """
    wanted = lora.peft_config.get("target_parameters") or []
    targeted: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 and any(name == one or name.endswith(f".{one}") for one in wanted):
            targeted.setdefault(name.rpartition(".")[0], []).append(name)
    pairs, scales, experts = dict(lora.pairs), dict(lora.scales), {}
    for module, names in targeted.items():
        for depth, name in enumerate(reversed(names)):
            path = module + ".base_layer" * depth
            if path not in pairs:
                raise ExportError(f"{lora.path} names {name} in target_parameters, but has no factors of it")
            del scales[path]
            experts[name] = _expert_weights(model, lora, name, pairs.pop(path))
    return replace(lora, pairs=pairs, scales=scales, experts=experts)


def _expert_weights(model: PreTrainedModel, lora: LoraWeights, name: str, pair: LoraPair) -> ExpertWeights:
    E, *sizes = model.get_parameter(name).shape
    transposed = bool(getattr(model.get_submodule(name.rpartition(".")[0]), "is_transposed", False))
    out, inner = reversed(sizes) if transposed else sizes
    if (len(pair.B), pair.A.shape[1]) != (out, inner) or len(pair.A) % E:
        raise ExportError(
            f"{lora.path} does not belong to the model: the factors of {name} are A {tuple(pair.A.shape)} and B"
            f" {tuple(pair.B.shape)}, the model has {E} experts of shape {(out, inner)}"
        )
    return ExpertWeights(pair, E, scale_of(name, len(pair.A) // E, lora.peft_config), transposed)
