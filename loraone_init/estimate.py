"""What a run will need, told from the model's shapes and the sample before anything is computed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .evaluation import num_evaluated
from .experts import ExpertLinear, expert_layers, fused_parameters, is_fused_experts
from .models import OpenModel
from .objective import MAX_LOGITS
from .targets import is_linear, layer_shape

_ACTIVATIONS = 1.4  # what a block's graph holds, for each element that goes into or comes out of a linear layer
_LOGIT_BUFFERS = 3
_EFFICIENCY = 0.65  # share of the matrix rate that whole blocks reach: seen 0.6 forward, 0.7 backward, on 2 cores
_SVD_ITERATIONS, _SVD_VECTORS, _SVD_EFFICIENCY = 5, 24, 0.2
_BLOCKS_AT_ONCE = {  # by placement, and whether on a CPU
    ("device", True): 0,
    ("device", False): 0,
    ("host", True): 0,
    ("host", False): 2,
    ("disk", True): 1,
    ("disk", False): 2,
}
_PROBE = 1024  # size of the product that measures the machine


@dataclass(frozen=True)
class Memory:
    """Bytes, on the device.

    outside:   weights that are always there: those that belong to no block, or all where none come and go.
    block:     weights that come and go: of the largest block; of two, where the next one comes ahead.
    gradients: of that block's target layers, and a copy of the largest for its SVD; twice as much in halves.
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


def estimate_memory(
    opened: OpenModel, targets: Mapping[str, nn.Module], batches: Sequence[Any], in_halves: bool = False
) -> Memory:
    """For batches with input_ids; of others nothing is known, so that inputs and working are 0.

    in_halves: each layer has two sums, one for each half of the sample.
    """
    tensors = [*opened.module.named_parameters(), *opened.module.named_buffers()]
    blocks = {block: [t for name, t in tensors if name.startswith(f"{block}.")] for block in opened.stack.names}
    block = max((_bytes(inside) for inside in blocks.values()), default=0)
    everything = _bytes([t for _, t in tensors])
    copies = _BLOCKS_AT_ONCE[opened.placement, opened.device.type == "cpu"]
    gradients = [_gradient_bytes(targets, name, in_halves) for name in opened.stack.names]
    read = [batch for batch in batches if isinstance(batch, Mapping) and "input_ids" in batch]
    tokens = [list(num_tokens(opened, batch).values()) for batch in read]
    size = _element_size(opened.module)
    graph = int(_ACTIVATIONS * size * _graph_elements(opened))
    has_vocabulary = bool(read) and opened.labels is None
    head = _LOGIT_BUFFERS * MAX_LOGITS * max(4, size) if has_vocabulary else 0
    return Memory(
        outside=everything - (sum(map(_bytes, blocks.values())) if copies else 0),
        block=copies * block,
        gradients=max(gradients, default=0),
        inputs=_hidden_size(opened.module) * size * sum(map(sum, tokens)),
        working=max(graph * max(map(max, filter(None, tokens)), default=0), head),
    )


def num_tokens(opened: OpenModel, batch: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """That pass each block, padding included: an encoder-decoder's decoder reads the labels, all else the input."""
    decoder = opened.module.get_decoder() if opened.task == "seq2seq-lm" else None  # type: ignore[operator]
    inside = set() if decoder is None else set(decoder.modules())
    sides = {
        name: "labels" if opened.module.get_submodule(name) in inside else "input_ids" for name in opened.stack.names
    }
    return {name: batch[side].numel() for name, side in sides.items()}


def estimate_seconds(
    opened: OpenModel,
    targets: Mapping[str, nn.Module],
    batches: Sequence[Any],
    num_label_tokens: int,
    evaluated: int | None = None,
) -> float:
    """After the model is open; by the floating-point operations of all products, and the machine's rate for one.

    evaluated: rows that go through the model after the gradient, in all passes; None: some of the batches' once.
    """
    tokens = {name: sum(num_tokens(opened, batch)[name] for batch in batches) for name in opened.stack.names}
    rows: int = sum(len(batch["input_ids"]) for batch in batches)
    linear = [name for name, module in opened.module.named_modules() if is_linear(module)]
    inside = {name: block for name in linear for block in opened.stack.names if name.startswith(f"{block}.")}
    products_of = {
        name: 2.0 * tokens[block] * _num_weights(opened.module.get_submodule(name)) for name, block in inside.items()
    }
    routed = _routed_share(opened.module)
    for block in opened.stack.names:
        experts = sum(map(_num_weights, _experts_within(opened.module.get_submodule(block))))
        products_of[f"{block} experts"] = 2.0 * tokens[block] * routed * experts
    forward = sum(products_of.values())
    head = 4.0 * num_label_tokens * sum(_num_weights(opened.module.get_submodule(n)) for n in {*linear} - {*inside})
    adapted = sum(_num_weights(module) for module in targets.values())
    svd = 4.0 * _SVD_VECTORS * _SVD_ITERATIONS * adapted
    share = (num_evaluated(rows) if evaluated is None else evaluated) / rows
    gradients = sum(products for name, products in products_of.items() if name in targets or name.endswith(" experts"))
    products = (2 + share) * forward + forward + gradients + head
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


def _gradient_bytes(targets: Mapping[str, nn.Module], block: str, in_halves: bool) -> int:
    """fp32 (fp64 for an fp64 model); the largest is there twice while its SVD runs. In halves, their sum is as well."""
    inside = [module for name, module in targets.items() if name.startswith(f"{block}.")]
    sizes = [_num_weights(module) * max(4, _weight_size(module)) for module in inside]
    return (2 if in_halves else 1) * (sum(sizes) + max(sizes, default=0))


def _graph_elements(opened: OpenModel) -> float:
    """Of one token, in the block that has the most."""
    routed = _routed_share(opened.module)
    blocks = [opened.module.get_submodule(name) for name in opened.stack.names]
    return max((_layer_elements(block) + routed * _expert_elements(block) for block in blocks), default=0.0)


def _layer_elements(block: nn.Module) -> int:
    return sum(sum(layer_shape(module)) for module in block.modules() if is_linear(module))


def _expert_elements(block: nn.Module) -> int:
    return sum(sum(layer_shape(layer)) for layer in _experts_within(block))


def _experts_within(block: nn.Module) -> list[ExpertLinear]:
    fused = [module for module in block.modules() if is_fused_experts(module)]
    return [layer for module in fused for name in fused_parameters(module) for layer in expert_layers(module, name)]


def _routed_share(module: nn.Module) -> float:
    """The share of its experts that a token meets; all, where the configuration does not say it in the usual words."""
    experts = next((m for m in module.modules() if is_fused_experts(m)), None)
    per_token = getattr(_text_config(module), "num_experts_per_tok", None)
    return 1.0 if experts is None or per_token is None else float(per_token) / len(expert_layers(experts, "down_proj"))


def _num_weights(module: nn.Module) -> int:
    rows, columns = layer_shape(module)
    return rows * columns


def _element_size(module: nn.Module) -> int:
    return max((parameter.element_size() for parameter in module.parameters()), default=4)


def _weight_size(module: nn.Module) -> int:
    assert isinstance(module.weight, torch.Tensor)
    return module.weight.element_size()


def _text_config(module: nn.Module) -> Any:
    config: Any = getattr(module, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else None


def _hidden_size(module: nn.Module) -> int:
    return int(getattr(_text_config(module), "hidden_size", 0))
