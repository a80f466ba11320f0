"""What a block's forward computed, kept for its backward while memory allows, so that it is not computed again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .changes import changed_after


class ActivationBudget:
    """Decides which calls of blocks keep their graph, by the bytes that graphs hold.

    limit: bytes for all graphs, and for the inputs that are kept with or without them.
    """

    def __init__(self, limit: int) -> None:
        self.left = limit
        self._first: int | None = None
        self._ratio = 0.0  # bytes that a graph holds for each byte of the call's input, the most seen

    def expect(self, input_bytes: int, num_blocks: int, num_batches: int) -> None:
        """Set room for all blocks' inputs aside, told by the first block's: the first call tells for all micro-batches,
        each one after it corrects what was set aside for its own.
        """
        if self._first is None:
            self._first = input_bytes
            self.left -= num_blocks * num_batches * input_bytes
        else:
            self.left -= num_blocks * (input_bytes - self._first)

    def allows(self, input_bytes: int) -> bool:
        """Whether the graph of a call will fit, by what earlier ones took. The first call finds out."""
        return self.left > 0 and self._ratio * input_bytes <= self.left

    def take(self, held: int, input_bytes: int) -> bool:
        """Whether a graph that holds so many bytes fits after all; if so, they are taken."""
        self._ratio = max(self._ratio, held / max(1, input_bytes))
        fits = held <= self.left
        self.left -= held if fits else 0
        return fits


class HeldBytes:
    """Counts what the graph made inside of `counted` holds: all that backward needs, but for the block's weights.

    Of those it holds only where to find them, so that a store may drop them in between. A tensor that was changed in
    place before the backward is a ModelError: autograd itself does not compare versions where such hooks are.
    """

    def __init__(self) -> None:
        self.total = 0

    @contextmanager
    def counted(self, module: nn.Module, name: str) -> Iterator[None]:
        """Around the forward of a block, given by its module and name."""
        weights = {_place(tensor): path for path, tensor in module.named_parameters()}
        held: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> Any:
            if _place(tensor) in weights:
                return weights[_place(tensor)], tensor.shape, tensor.stride(), tensor.storage_offset()
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor, tensor._version

        def unpack(packed: Any) -> torch.Tensor:
            first, *rest = packed
            if isinstance(first, str):
                return module.get_parameter(first).as_strided(*rest)
            assert isinstance(first, torch.Tensor)
            if [first._version] != rest:
                raise changed_after("a tensor", name)
            return first

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
        self.total = sum(held.values())


def _place(tensor: torch.Tensor) -> tuple[int, torch.dtype]:
    """Where a tensor's storage is. Weights may share one: then any of them leads to it, if its elements are as wide."""
    return tensor.untyped_storage().data_ptr(), tensor.dtype
