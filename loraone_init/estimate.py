"""What a run will need, told from the model's shapes and the sample before anything is computed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .evaluation import num_evaluated
from .models import OpenModel
from .objective import MAX_LOGITS
from .targets import is_linear, layer_shape

_ACTIVATIONS = 1.4  # what a block's graph holds, for each element that goes into or comes out of a linear layer
_LOGIT_BUFFERS = 3
_EFFICIENCY = 0.65  # share of the matrix rate that whole blocks reach: seen 0.6 forward, 0.7 backward, on 2 cores
_SVD_ITERATIONS, _SVD_VECTORS, _SVD_EFFICIENCY = 5, 24, 0.2
_PROBE = 1024  # size of the product that measures the machine


@dataclass(frozen=True)
class Memory:
    """Bytes, on the device.

    outside:   weights that belong to no block; they are always there.
    block:     weights of the largest block.
    gradients: of that block's target layers, and a copy of the largest for its SVD.
    inputs:    of all blocks, for the whole sample: kept from the forward to the backward.
    working:   what one block computes for the largest micro-batch, or the head for its chunk of logits.
    """

    outside: int
    block: int
    gradients: int
    inputs: int
    working: int

    @property
    def to_come(self) -> int:
        """What is not there yet when the model has been opened, but for the inputs."""
        return self.block + self.gradients + self.working

    @property
    def total(self) -> int:
        return self.outside + self.inputs + self.to_come


def estimate_memory(opened: OpenModel, targets: Mapping[str, nn.Module], batches: Sequence[Any]) -> Memory:
    """For batches with input_ids; of others nothing is known, so that inputs and working are 0."""
    tensors = [*opened.module.named_parameters(), *opened.module.named_buffers()]
    blocks = {block: [t for name, t in tensors if name.startswith(f"{block}.")] for block in opened.stack.names}
    block = max((_bytes(inside) for inside in blocks.values()), default=0)
    everything = _bytes([t for _, t in tensors])
    gradients = [_gradient_bytes(targets, name) for name in opened.stack.names]
    tokens = [batch["input_ids"].numel() for batch in batches if isinstance(batch, Mapping) and "input_ids" in batch]
    size = _element_size(opened.module)
    graph = int(_ACTIVATIONS * size * _graph_elements(opened))
    head = _LOGIT_BUFFERS * MAX_LOGITS * max(4, size) if tokens else 0
    return Memory(
        outside=everything - sum(map(_bytes, blocks.values())),
        block=block,
        gradients=max(gradients, default=0),
        inputs=len(blocks) * _hidden_size(opened.module) * size * sum(tokens),
        working=max(graph * max(tokens, default=0), head),
    )


def estimate_seconds(
    opened: OpenModel, targets: Mapping[str, nn.Module], batches: Sequence[Any], num_label_tokens: int
) -> float:
    """After the model is open; by the floating-point operations of all products, and the machine's rate for one."""
    tokens: int = sum(batch["input_ids"].numel() for batch in batches)
    rows: int = sum(len(batch["input_ids"]) for batch in batches)
    linear = [name for name, module in opened.module.named_modules() if is_linear(module)]
    inside = [name for name in linear if any(name.startswith(f"{block}.") for block in opened.stack.names)]
    forward = 2.0 * tokens * sum(_num_weights(opened.module.get_submodule(name)) for name in inside)
    head = 4.0 * num_label_tokens * sum(_num_weights(opened.module.get_submodule(n)) for n in {*linear} - {*inside})
    adapted = sum(_num_weights(module) for module in targets.values())
    svd = 4.0 * _SVD_VECTORS * _SVD_ITERATIONS * adapted
    evaluated = num_evaluated(rows) / rows
    products = (2 + evaluated) * forward + forward + 2.0 * tokens * adapted + head
    return (products / _EFFICIENCY + svd / _SVD_EFFICIENCY) / matrix_rate(opened.device)


def matrix_rate(device: torch.device) -> float:
    """Floating-point operations per second of an fp32 product, the best of ten."""
    A = torch.ones(_PROBE, _PROBE, device=device)
    seconds: list[float] = []
    for _ in range(11):
        start = time.perf_counter()
        (A @ A)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    fastest = min(seconds[1:])
    return 2.0 * float(_PROBE) ** 3 / fastest


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _gradient_bytes(targets: Mapping[str, nn.Module], block: str) -> int:
    """fp32 (fp64 for an fp64 model); the largest is there twice while its SVD runs."""
    inside = [module for name, module in targets.items() if name.startswith(f"{block}.")]
    sizes = [_num_weights(module) * max(4, _element_size(module)) for module in inside]
    return sum(sizes) + max(sizes, default=0)


def _graph_elements(opened: OpenModel) -> int:
    """Of one token, in the block that has the most."""
    modules = dict(opened.module.named_modules())
    return max(
        (
            sum(sum(layer_shape(m)) for name, m in modules.items() if name.startswith(f"{block}.") and is_linear(m))
            for block in opened.stack.names
        ),
        default=0,
    )


def _num_weights(module: nn.Module) -> int:
    rows, columns = layer_shape(module)
    return rows * columns


def _element_size(module: nn.Module) -> int:
    return max((parameter.element_size() for parameter in module.parameters()), default=4)


def _hidden_size(module: nn.Module) -> int:
    config: Any = getattr(module, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    return int(getattr(text, "hidden_size", 0))
