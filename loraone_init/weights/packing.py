"""A block's weights side by side in one buffer, so that they move in one copy."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..machine import current_device

_ALIGNMENT = 256  # bytes; what CUDA's own allocations have


@dataclass(frozen=True)
class Place:
    """Where one tensor lies in the buffer."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype


class Layout:
    """Where each of some tensors lies in a buffer of `nbytes` bytes."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.places: dict[str, Place] = {}
        self.nbytes = 0
        for name, tensor in tensors.items():
            self.places[name] = Place(self.nbytes, tensor.shape, tensor.dtype)
            self.nbytes += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors in a buffer (at least nbytes,) of bytes; they share its memory."""
        return {name: self.view(buffer, name) for name in self.places}

    def view(self, buffer: torch.Tensor, name: str) -> torch.Tensor:
        place = self.places[name]
        size = place.shape.numel() * place.dtype.itemsize
        return buffer[place.offset : place.offset + size].view(place.dtype).view(place.shape)


def host_buffer(nbytes: int, pinned_for: object | None, device: torch.device) -> torch.Tensor:
    """Bytes (nbytes,) of host memory.

    pinned_for: while this object lives, a CUDA device copies from and to the buffer without the CPU's help. Done by
                registering ordinary memory: torch's own pinned allocator rounds sizes up to powers of two, which would
                waste up to half of the host's memory. None: memory of the ordinary kind.
    device:     the one that copies.
    """
    buffer = torch.empty(nbytes, dtype=torch.uint8)
    if pinned_for is not None and nbytes:
        with current_device(device):
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), nbytes, 0)))
        weakref.finalize(pinned_for, _unpin, buffer, device).atexit = False  # holds the buffer until then
    return buffer


def _unpin(buffer: torch.Tensor, device: torch.device) -> None:
    with current_device(device):
        torch.cuda.synchronize()  # a copy may be under way
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())))
