"""Sizes of layers and blocks in elements and bytes, fused experts included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..linalg.svd import svd_bytes
from .experts import ExpertLinear, expert_layers, fused_parameters, is_fused_experts
from .targets import is_linear, layer_shape

ACTIVATIONS = 1.4
"""Elements that a block's graph holds for each element into or out of a linear layer, by measurement."""


def total_bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def gradient_bytes(
    layers: Mapping[str, nn.Module],
    in_halves: bool = False,
    ranks: Mapping[str, int] | None = None,
    batch_bytes: int = 0,
) -> int:
    """The sums of these layers' gradients in fp32 (fp64 for an fp64 model), and what the SVD takes that takes most. In
    halves, all are there twice, and the sum of one layer's.

    ranks:       up to which each layer is decomposed; None: each SVD is counted as a copy.
    batch_bytes: what the SVDs of a batch take, where there are so many.
    """
    itemsizes = {name: max(4, _weight_size(module)) for name, module in layers.items()}
    sizes = {name: num_weights(module) * itemsizes[name] for name, module in layers.items()}
    svds = [
        sizes[name] if ranks is None else svd_bytes(layer_shape(module), ranks[name], itemsizes[name])
        for name, module in layers.items()
    ]
    summed = max(sizes.values(), default=0) if in_halves else 0
    decomposed = max(max(svds, default=0), min(sum(svds), batch_bytes))
    return (2 if in_halves else 1) * sum(sizes.values()) + summed + decomposed


def layer_elements(block: nn.Module) -> int:
    return sum(sum(layer_shape(module)) for module in block.modules() if is_linear(module))


def expert_elements(block: nn.Module) -> int:
    return sum(sum(layer_shape(layer)) for layer in experts_within(block))


def experts_within(block: nn.Module) -> list[ExpertLinear]:
    fused = [module for module in block.modules() if is_fused_experts(module)]
    return [layer for module in fused for name in fused_parameters(module) for layer in expert_layers(module, name)]


def routed_share(module: nn.Module) -> float:
    """The share of its experts that a token meets; all, where the configuration does not say it in the usual words."""
    experts = next((m for m in module.modules() if is_fused_experts(m)), None)
    per_token = getattr(text_config(module), "num_experts_per_tok", None)
    return 1.0 if experts is None or per_token is None else float(per_token) / len(expert_layers(experts, "down_proj"))


def num_weights(module: nn.Module) -> int:
    rows, columns = layer_shape(module)
    return rows * columns


def element_size(module: nn.Module) -> int:
    return max((parameter.element_size() for parameter in module.parameters()), default=4)


def _weight_size(module: nn.Module) -> int:
    assert isinstance(module.weight, torch.Tensor)
    return module.weight.element_size()


def text_config(module: nn.Module) -> Any:
    """The configuration of the language model, None for a module without one."""
    config: Any = getattr(module, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else None


def hidden_size(module: nn.Module) -> int:
    return int(getattr(text_config(module), "hidden_size", 0))


def activation_elements(block: nn.Module, routed: float) -> float:
    """About what a block's graph holds of one token. routed: the share of its experts that a token meets."""
    return ACTIVATIONS * (layer_elements(block) + routed * expert_elements(block))


def working_bytes(block: nn.Module, tokens: int, routed: float) -> int:
    """About what a block's fp32 gradients take, and what it computes for a micro-batch of so many tokens."""
    layers: list[nn.Module] = [*filter(is_linear, block.modules()), *experts_within(block)]
    size = element_size(block)
    return max(4, size) * sum(map(num_weights, layers)) + int(size * tokens * activation_elements(block, routed))
