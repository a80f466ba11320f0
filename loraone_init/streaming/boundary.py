"""Where a micro-batch leaves one block's graph and enters the glue's, and what is kept of it while it waits."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from .keeping import Keeper, Kept
from .taps import tapped


class Gradients:
    """Of a block's floating outputs, summed over all that reaches them; None where nothing does."""

    def __init__(self, keeper: Keeper, number: int) -> None:
        self._keeper = keeper
        self._sums: list[Kept | None] = [None] * number

    def add(self, index: int, gradient: torch.Tensor) -> None:
        before = self._sums[index]
        self._sums[index] = self._keeper.put(gradient if before is None else before.get() + gradient)

    def take(self, index: int) -> torch.Tensor | None:
        """The sum, which is kept no longer."""
        kept, self._sums[index] = self._sums[index], None
        return None if kept is None else kept.get()


class Answer:
    """What a block returned, kept until the micro-batch goes on, and while it waits at the next block.

    gradients: where the glue's gradients go; None: the outputs need none.
    """

    def __init__(self, outputs: Any, keeper: Keeper, gradients: Gradients | None) -> None:
        flat, self._spec = pytree.tree_flatten(outputs)
        self._flat = [keeper.put(value) if isinstance(value, torch.Tensor) else value for value in flat]
        self._keeper = keeper
        self._gradients = gradients
        self._given: list[tuple[torch.Tensor, int, Kept]] = []
        self._emptied: list[tuple[torch.UntypedStorage, Kept]] = []

    def give(self) -> Any:
        """The outputs as the glue sees them."""
        outputs, number = [], 0
        for value in self._flat:
            if not isinstance(value, Kept):
                outputs.append(value)
                continue
            tensor = value.get()
            if tensor.is_floating_point():
                tensor, number = self._exit(tensor, number), number + 1
            else:
                tensor = tensor.detach()
            self._keeper.note(tensor, value)
            self._given.append((tensor, tensor._version, value))
            outputs.append(tensor)
        return pytree.tree_unflatten(outputs, self._spec)

    def rest(self) -> None:
        """The micro-batch waits: empty what it was given, where that was moved off the device.

        The model's frames still hold those tensors. They are copies that nobody else has, and nobody reads them
        before `wake`.
        """
        given, self._given = self._given, []
        for tensor, version, kept in given:
            storage = tensor.untyped_storage()
            if kept.tier != "device" and tensor._version == version and storage.resizable():
                storage.resize_(0)
                self._emptied.append((storage, kept))
        self._flat = []

    def wake(self) -> None:
        """Before the micro-batch goes on."""
        for storage, kept in self._emptied:
            kept.refill(storage)
        self._emptied.clear()

    def _exit(self, tensor: torch.Tensor, number: int) -> torch.Tensor:
        gradients = self._gradients
        if gradients is None:
            return tensor.detach()
        return tapped(tensor, lambda gradient: gradients.add(number, gradient))


def leaf(value: Any, with_grad: bool) -> Any:
    """A tensor cut off from its graph (same storage); anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().requires_grad_(with_grad and value.is_floating_point())


def is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def requires_grad(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad
