"""Layers that no forward calls: unused ones have no gradient, but those whose weight is read otherwise do.

`nn.MultiheadAttention` reads the weight of its `out_proj`, for one, and never calls that layer. Neither a hook nor an
adapter would see what passes through it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..data.pieces import Piece
from ..errors import ModelError
from ..layers.experts import ExpertLinear
from ..streaming.driver import stream_forward
from ..streaming.stack import BlockStack
from .micro_batches import MicroBatches
from .objective import Objective


class UncalledError(ModelError):
    """layers: those that are never called, but whose weights a forward reads."""

    def __init__(self, message: str, layers: Sequence[str]) -> None:
        super().__init__(message)
        self.layers = tuple(layers)


def check_uncalled(
    stack: BlockStack, objective: Objective, targets: Mapping[str, nn.Module], called: Set[str], piece: Piece
) -> None:
    """Raises UncalledError for layers that are not among the `called` while a forward of `piece` reads their weight.

    Experts that met no token, and layers that this forward leaves out, are no matter.
    """
    uncalled = {name: module for name, module in targets.items() if name not in called}
    layers = {name: module for name, module in uncalled.items() if not isinstance(module, ExpertLinear)}
    if layers:
        shared = _shared_weights(stack.model)
        layers = {name: module for name, module in layers.items() if id(module.weight) not in shared}
    if not layers:
        return
    read: set[str] = set()
    watched = _WatchedStack(stack, layers, read)

    def forward(part: Piece) -> Any:
        with _Watch(layers, read):
            return objective.forward(part.content)

    micro_batches = MicroBatches([piece], stack)

    def run() -> None:
        with objective.active():
            forwards = [partial(forward, part) for part in micro_batches.pieces]
            stream_forward(watched, forwards, lambda index, result: None)

    micro_batches.attempt(run)
    names = [name for name in layers if name in read]
    if names:
        endings = ",".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
        raise UncalledError(
            f"layer {names[0]}{f' and {len(names) - 1} others are' if names[1:] else ' is'} never called, but the model"
            " reads the weight, as nn.MultiheadAttention does: an adapter would have no effect there; leave it out with"
            f' `exclude_modules="{endings}"`',
            names,
        )


class _Watch(TorchDispatchMode):
    """Inside, in this thread, the names of layers whose weight goes into an operation are added to `read`."""

    def __init__(self, layers: Mapping[str, nn.Module], read: set[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._layers = layers
        self._read = read

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [value for value in pytree.tree_leaves((args, kwargs or {})) if isinstance(value, torch.Tensor)]
        places = {tensor.data_ptr() for tensor in tensors if tensor.device.type != "meta"}
        for name, layer in self._layers.items():
            assert isinstance(layer.weight, torch.Tensor)
            if layer.weight.device.type != "meta" and layer.weight.data_ptr() in places:
                self._read.add(name)
        return func(*args, **(kwargs or {}))


class _WatchedStack(BlockStack):
    """A stack as given, whose blocks are watched while they compute; not while their weights are loaded."""

    def __init__(self, stack: BlockStack, layers: Mapping[str, nn.Module], read: set[str]) -> None:
        self.__dict__.update(stack.__dict__)
        self._layers = layers
        self._read = read

    def run(self, block: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with _Watch(self._layers, self._read):
            return super().run(block, args, kwargs)


def _shared_weights(model: nn.Module) -> set[int]:
    """Identities of the parameters that several modules have: another one may read them for itself."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared
