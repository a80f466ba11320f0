"""What autograd keeps of a computation for its backward, in bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class HeldBytes:
    """Counts the storages that the graph made inside of `counted` holds, but for the module's weights."""

    def __init__(self) -> None:
        self.total = 0

    @contextmanager
    def counted(self, module: nn.Module) -> Iterator[None]:
        weights = {tensor.untyped_storage().data_ptr() for tensor in module.parameters()}
        held: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
        self.total = sum(held.values())
