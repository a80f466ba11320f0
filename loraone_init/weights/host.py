"""Weights in host memory, copied to the device for each use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import nn

from .base import drop, present, tensors_inside
from .lane import CudaLane, DoubleBuffer, Lane
from .packing import Layout, host_buffer
from .reader import WeightReader


class HostStore:
    """Weights that are held in host memory, pinned where the device is a GPU, one buffer for each block.

    While a block computes, the next is copied to the device on a side stream; at most two blocks are there. On a CPU,
    host and device are the same memory: nothing is copied, and a block's weights are where they are.
    Outside of `loaded` a block's parameters are on the meta device.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[str],
        device: torch.device,
        reader: WeightReader | None = None,
        lane: Lane | None = None,
    ) -> None:
        """Takes the blocks' weights from `reader`, or out of the model. lane: for a GPU, a stream if None is given."""
        self._model = model
        self._layouts: dict[str, Layout] = {}
        self._buffers: dict[str, torch.Tensor] = {}
        for block in blocks:
            self._hold(block, reader, device)
        self._device = device
        self._lane = CudaLane(device) if lane is None and device.type == "cuda" else lane

    @contextmanager
    def loaded(self, block: str) -> Iterator[None]:
        if self._lane is None:
            with present(self._model, self._layouts[block].views(self._buffers[block])):
                yield
            return
        buffers = self._on_device
        if not buffers.holds(block):
            buffers.start(block, self._buffers[block])
        tensors = self._layouts[block].views(buffers.take(block))
        try:
            with present(self._model, tensors):
                yield
        finally:
            buffers.release()

    def prefetch(self, block: str) -> None:
        if self._lane is not None and not self._on_device.holds(block):
            self._on_device.start(block, self._buffers[block])

    def _hold(self, block: str, reader: WeightReader | None, device: torch.device) -> None:
        if reader is None:
            tensors = tensors_inside(self._model, block)
        else:
            tensors = {name: reader.declared(name) for name in reader.inside(block)}
        layout = self._layouts[block] = Layout(tensors)
        buffer = self._buffers[block] = host_buffer(layout.nbytes, self if device.type == "cuda" else None, device)
        for name, tensor in tensors.items() if reader is None else reader.read(tensors):
            layout.view(buffer, name).copy_(tensor)
        drop(self._model, tensors)

    @cached_property
    def _on_device(self) -> DoubleBuffer:
        """Made when the first block is needed."""
        assert self._lane is not None
        return DoubleBuffer(max(layout.nbytes for layout in self._layouts.values()), self._device, self._lane)
