"""Where a block's weights are between its uses: in the model all along, or in the checkpoint on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import nn

from .checkpoint import Checkpoint


class WeightStore(Protocol):
    """Makes a block's weights present on the device for the time of a context."""

    def loaded(self, block: str) -> AbstractContextManager[None]: ...


class ResidentStore:
    """Weights that are in the model already: nothing to load, nothing to drop."""

    def loaded(self, block: str) -> AbstractContextManager[None]:
        return nullcontext()


class DiskStore:
    """Weights that are read from the safetensors checkpoint at each use and dropped after it.

    tensor_names: the checkpoint's name for every parameter and persistent buffer of the model.
    Outside of `loaded` a block's parameters are on the meta device, without storage.
    """

    def __init__(
        self, model: nn.Module, checkpoint: Checkpoint, tensor_names: Mapping[str, str], device: torch.device
    ) -> None:
        self._model = model
        self._checkpoint = checkpoint
        self._tensor_names = tensor_names
        self._device = device

    @contextmanager
    def loaded(self, block: str) -> Iterator[None]:
        names = [name for name in self._tensor_names if name.startswith(f"{block}.")]
        self.load(names)
        try:
            yield
        finally:
            for name in names:
                tensor = get_tensor(self._model, name)
                set_tensor(self._model, name, torch.empty_like(tensor, device="meta"))

    def load(self, names: list[str]) -> None:
        """Read the named parameters and buffers into the model, in the dtype that the model declares for them."""
        for name in names:
            declared = get_tensor(self._model, name)
            tensor = self._checkpoint.read(self._tensor_names[name], declared.shape)
            set_tensor(self._model, name, tensor.to(device=self._device, dtype=declared.dtype))


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
