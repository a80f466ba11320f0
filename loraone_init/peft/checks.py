"""What `initialize_peft` cannot do exactly, refused by name before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftType
from torch import nn
from torch.distributed.tensor import DTensor

from ..errors import ConfigError, ModelError
from ..gradients.objective import LossFunction
from ..layers.experts import fused_parameters, is_fused_experts
from ..layers.targets import is_linear
from .layers import AdaptedLayer, auxiliary_wrappers, not_linear

_PLAIN_INITS = (True, False, "gaussian")  # they leave the base as it is, and A and B are overwritten
_PLAIN_VARIANTS = ("DoraLinearVariant",)
_INSTEAD = (
    "initialise before the model is wrapped (`initialize_peft`, or loraone-init and PeftModel.from_pretrained), then"
    " train from that adapter without this step"
)


def check_loss(base: nn.Module, loss: LossFunction | None) -> None:
    """Raise ModelError for a model whose own loss is not ours, where no other is given."""
    name = type(base).__name__
    if loss is None and name.endswith("ForMaskedLM"):
        raise ModelError(f"{name} predicts masked tokens, which is another loss; pass loss=")


def check_config(config: Any, adapter: str) -> None:
    """Raise ConfigError for a kind of adapter, or a first start, that ours cannot take the place of."""
    if config.peft_type != PeftType.LORA:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ConfigError(f"adapter {adapter!r} is of the kind {kind}, which has no LoRA factors; use a LoraConfig")
    if config.init_lora_weights not in _PLAIN_INITS:
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r} of adapter {adapter!r} is a start of its own, and may have"
            " changed the base model's weights; make the model anew with init_lora_weights=True"
        )
    if config.layer_replication:
        raise ConfigError("layer_replication makes another model of the base; it is not known here; leave it out")


def check_whole(model: nn.Module) -> None:
    """Raise ModelError for parameters that are not whole, or not what the optimizer steps: FSDP, DeepSpeed, offload."""
    for module in model.modules():
        if type(module).__name__ in ("FullyShardedDataParallel", "DeepSpeedEngine"):
            raise ModelError(f"the model is under {type(module).__name__}, which shards it; {_INSTEAD}")
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise ModelError(f"DeepSpeed ZeRO-3 has sharded the model ({name}); {_INSTEAD}")
        if hasattr(parameter, "_hp_mapping"):
            raise ModelError(f"DeepSpeed trains a copy of its own of the parameters ({name}); {_INSTEAD}")
        if isinstance(parameter, DTensor):
            raise ModelError(f"parameter {name} is spread over several devices (FSDP2, tensor parallelism); {_INSTEAD}")
        if parameter.is_meta:
            raise ModelError(f"parameter {name} is not in memory (device meta); load the whole model on one device")
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        raise ModelError(
            f"the model is spread over {', '.join(devices)}; load it on one device, or use loraone-init, which streams"
            " what does not fit"
        )


def check_layers(base: nn.Module, layers: Sequence[AdaptedLayer], overwrite: bool) -> None:
    """Raise ModelError or ConfigError for a layer whose start would not be exactly ours.

    overwrite: whether factors that are no longer at their start may be replaced.
    """
    for name, wrapper in auxiliary_wrappers(base):
        raise ModelError(
            f"{name} is under PEFT's {type(wrapper).__name__} (trainable_token_indices), whose part in the gradient is"
            " not known here; leave that out, or name the module in modules_to_save"
        )
    owners: dict[int, str] = {}
    for layer in layers:
        _check_kind(layer)
        _check_state(layer, overwrite)
        for factor in (layer.A, layer.B):
            other = owners.setdefault(id(factor), layer.name)
            if other != layer.name:
                raise ModelError(f"layers {other} and {layer.name} share a factor, which cannot start as both need it")


def _check_kind(layer: AdaptedLayer) -> None:
    wrapper, adapter = layer.wrapper, layer.adapter
    fused = is_fused_experts(layer.base) and layer.name.rpartition(".")[2] in fused_parameters(layer.base)
    if not (is_linear(layer.base) or fused):
        raise not_linear(layer.name, layer.base)
    variant = type(wrapper.lora_variant.get(adapter)).__name__ if adapter in wrapper.lora_variant else None
    if variant is not None and variant not in _PLAIN_VARIANTS:
        raise ModelError(
            f"layer {layer.name} uses PEFT's {variant.removesuffix('Variant')}, which computes something else than"
            " LoRA; make the adapter without it"
        )
    if wrapper.lora_bias.get(adapter):
        raise ModelError(f"layer {layer.name} has a bias in B (lora_bias=True), for which there is no start; leave it")


def _check_state(layer: AdaptedLayer, overwrite: bool) -> None:
    wrapper, adapter = layer.wrapper, layer.adapter
    if wrapper.merged_adapters:
        raise ModelError(
            f"layer {layer.name} has adapter {wrapper.merged_adapters[0]!r} merged into its weight; call"
            " unmerge_adapter() first"
        )
    active = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
    if adapter in active and len(active) > 1:
        raise ModelError(
            f"the adapters {', '.join(map(repr, active))} are active at once, so that the training would start from"
            f" another function; activate {adapter!r} alone"
        )
    if not overwrite and bool(torch.count_nonzero(layer.B)):
        raise ConfigError(
            f"the factors of adapter {adapter!r} are not at their start: B of layer {layer.name} is not zero (trained"
            " already, or initialised); pass `overwrite=True` to replace them"
        )
