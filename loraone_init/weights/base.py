"""What a store of weights is, and the simplest one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import nn


class WeightStore(Protocol):
    """Where a block's weights are between its uses."""

    def loaded(self, block: str) -> AbstractContextManager[None]:
        """A context in which the block's weights are on the device."""
        ...

    def prefetch(self, block: str) -> None:
        """Begin to fetch the block that will be loaded next, while the present one computes; never waits for it."""
        ...


class ResidentStore:
    """Weights that are in the model already: nothing to load, nothing to drop."""

    def loaded(self, block: str) -> AbstractContextManager[None]:
        return nullcontext()

    def prefetch(self, block: str) -> None:
        """They are there."""


def tensors_inside(model: nn.Module, block: str) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers of a block by full name; a tensor that is there twice has both names."""
    module, prefix = model.get_submodule(block), f"{block}."
    found: dict[str, torch.Tensor] = dict(module.named_parameters(prefix=block, remove_duplicate=False))
    persistent = module.state_dict(prefix=prefix, keep_vars=True)
    buffers = module.named_buffers(prefix=block, remove_duplicate=False)
    return found | {name: tensor for name, tensor in buffers if name in persistent}


@contextmanager
def present(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """`tensors` in their places by name; after, these are on the meta device again, without storage."""
    try:
        for name, tensor in tensors.items():
            set_tensor(model, name, tensor)
        yield
    finally:
        drop(model, tensors)


def drop(model: nn.Module, names: Iterable[str]) -> None:
    """Put the named tensors on the meta device, where only shape and dtype are left of them."""
    for name in names:
        set_tensor(model, name, torch.empty_like(get_tensor(model, name), device="meta"))


def get_tensor(model: nn.Module, name: str) -> torch.Tensor:
    """The parameter or buffer called `name`."""
    path, _, leaf = name.rpartition(".")
    tensor = getattr(model.get_submodule(path), leaf)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def set_tensor(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put `tensor` in the place of the parameter (frozen) or buffer called `name`."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor
