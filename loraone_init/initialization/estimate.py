"""What a run will need, told from the model's shapes and the sample before anything is computed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import Schedule
from ..gradients.causal_lm import MAX_LOGITS
from ..layers.language import find_decoder
from ..layers.sizes import (
    activation_elements,
    element_size,
    experts_within,
    gradient_bytes,
    hidden_size,
    num_weights,
    routed_share,
    total_bytes,
)
from ..layers.targets import is_linear
from ..models.opening import OpenModel
from .evaluation import num_evaluated
from .layer_starts import BATCH_BYTES

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
    block:     weights that come and go: of the largest block; of two, where the next one comes ahead. Row by row, those
               of all blocks that are not there yet.
    gradients: of that block's target layers, or of all; and what the largest SVD takes. In halves, sums twice.
    inputs:    of all blocks, for the whole sample: kept from the forward to the backward. None row by row.
    working:   what one block, or all of them, compute for the largest micro-batch, or the head for its chunk of logits.
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
    opened: OpenModel,
    targets: Mapping[str, nn.Module],
    batches: Sequence[Any],
    in_halves: bool = False,
    ranks: Mapping[str, int] | None = None,
    schedule: Schedule = "blocks",
    most_tokens: int | None = None,
) -> Memory:
    """For batches with input_ids; of others nothing is known, so that inputs and working are 0.

    in_halves: each layer has two sums, one for each half of the sample.
    ranks:     up to which each layer is decomposed; None: each SVD is counted as a copy of its gradient.
    most_tokens: up to which micro-batches that have more are cut.
    """
    tensors = [*opened.module.named_parameters(), *opened.module.named_buffers()]
    blocks = {block: total_bytes([t for name, t in tensors if name.startswith(f"{block}.")]) for block in opened.blocks}
    everything = total_bytes([t for _, t in tensors])
    copies = _BLOCKS_AT_ONCE[opened.placement, opened.device.type == "cpu"]
    read = [batch for batch in batches if isinstance(batch, Mapping) and _num_tokens(batch, "input_ids")]
    tokens = [num_tokens(opened, batch) for batch in read]
    size = element_size(opened.module)
    has_vocabulary = bool(read) and opened.labels is None
    head = _LOGIT_BUFFERS * MAX_LOGITS * max(4, size) if has_vocabulary else 0
    graphs = _graph_elements(opened)
    batch = 3 * BATCH_BYTES if opened.device.type == "cuda" and ranks is not None else 0
    outside = everything - (sum(blocks.values()) if copies else 0)
    if schedule == "rows":
        shares = [1.0 if most_tokens is None else min(1.0, most_tokens / batch["input_ids"].numel()) for batch in read]
        elements = [sum(graphs[block] * n for block, n in each.items()) for each in tokens]
        graph = max((share * held for share, held in zip(shares, elements, strict=True)), default=0.0)
        return Memory(
            outside=outside,
            block=sum(blocks.values()) if copies else 0,
            gradients=gradient_bytes(targets, in_halves, ranks, batch),
            inputs=0,
            working=int(size * graph) + head,
        )
    layers = [
        {name: layer for name, layer in targets.items() if name.startswith(f"{block}.")} for block in opened.blocks
    ]
    largest = max((max(each.values()) for each in tokens if each), default=0)
    return Memory(
        outside=outside,
        block=copies * max(blocks.values(), default=0),
        gradients=max((gradient_bytes(each, in_halves, ranks, batch) for each in layers), default=0),
        inputs=hidden_size(opened.module) * size * sum(sum(each.values()) for each in tokens),
        working=max(int(size * max(graphs.values(), default=0.0)) * largest, head),
    )


def num_tokens(opened: OpenModel, batch: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The tokens that pass each block, with padding: a decoder beside an encoder reads the labels, else the input."""
    decoder = find_decoder(opened.module) if opened.task == "seq2seq-lm" else None
    inside = set() if decoder is None else set(decoder.modules())
    sides = {name: "labels" if opened.module.get_submodule(name) in inside else "input_ids" for name in opened.blocks}
    return {name: _num_tokens(batch, side) or _num_tokens(batch, "input_ids") for name, side in sides.items()}


def _num_tokens(batch: Mapping[str, Any], side: str) -> int:
    tokens = batch.get(side)
    return tokens.numel() if isinstance(tokens, torch.Tensor) else 0


def estimate_seconds(
    opened: OpenModel,
    targets: Mapping[str, nn.Module],
    batches: Sequence[Any],
    num_label_tokens: int,
    evaluated: int | None = None,
    schedule: Schedule = "blocks",
    rate: float | None = None,
) -> float:
    """After the model is open; by the floating-point operations of all products, and the machine's rate for one.

    evaluated: rows that go through the model after the gradient, in all passes; None: some of the batches' once.
    rate:      of the machine (see `matrix_rate`), which is measured if it is left out.
    """
    counts = [num_tokens(opened, batch) for batch in batches]
    tokens = {name: sum(count[name] for count in counts) for name in opened.blocks}
    rows: int = sum(len(batch["input_ids"]) for batch in batches)
    linear = [name for name, module in opened.module.named_modules() if is_linear(module)]
    inside = {name: block for name in linear for block in opened.blocks if name.startswith(f"{block}.")}
    products_of = {
        name: 2.0 * tokens[block] * num_weights(opened.module.get_submodule(name)) for name, block in inside.items()
    }
    routed = routed_share(opened.module)
    for block in opened.blocks:
        experts = sum(map(num_weights, experts_within(opened.module.get_submodule(block))))
        products_of[f"{block} experts"] = 2.0 * tokens[block] * routed * experts
    forward = sum(products_of.values())
    head = 4.0 * num_label_tokens * sum(num_weights(opened.module.get_submodule(n)) for n in {*linear} - {*inside})
    adapted = sum(num_weights(module) for module in targets.values())
    svd = 4.0 * _SVD_VECTORS * _SVD_ITERATIONS * adapted
    share = (num_evaluated(rows) if evaluated is None else evaluated) / rows
    gradients = sum(products for name, products in products_of.items() if name in targets or name.endswith(" experts"))
    recomputed = forward if schedule == "blocks" else 0.0
    products = (2 + share) * forward + recomputed + gradients + head  # forward, gradients of inputs and of weights
    return (products / _EFFICIENCY + svd / _SVD_EFFICIENCY) / (rate or matrix_rate(opened.device))


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


def _graph_elements(opened: OpenModel) -> dict[str, float]:
    """What the graph of one token holds, by block."""
    routed = routed_share(opened.module)
    return {block: activation_elements(opened.module.get_submodule(block), routed) for block in opened.blocks}
