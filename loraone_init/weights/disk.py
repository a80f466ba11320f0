"""Weights in the checkpoint on disk, read for each use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import nn

from .base import present
from .lane import CudaLane, DoubleBuffer, Lane
from .packing import Layout, host_buffer
from .reader import WeightReader


class DiskStore:
    """Weights that are read from the safetensors checkpoint at each use and dropped after it.

    For a GPU, a thread reads the next block into pinned memory while the present one computes, and a side stream
    copies it from there: two blocks at most in host memory, and two on the device. On a CPU, one block is there.
    Outside of `loaded` a block's parameters are on the meta device, without storage.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[str],
        device: torch.device,
        reader: WeightReader,
        lane: Lane | None = None,
    ) -> None:
        """lane: for a GPU, a stream if None is given."""
        self._model = model
        self._reader = reader
        lane = CudaLane(device) if lane is None and device.type == "cuda" else lane
        self._lane = lane
        self._blocks, self._device = blocks, device

    @contextmanager
    def loaded(self, block: str) -> Iterator[None]:
        if self._lane is None:
            with present(self._model, dict(self._reader.read(self._reader.inside(block)))):
                yield
            return
        pipeline = self._pipeline
        tensors = pipeline.take(block)
        try:
            with present(self._model, tensors):
                yield
        finally:
            pipeline.release()

    def prefetch(self, block: str) -> None:
        if self._lane is not None:
            self._pipeline.start(block)

    @cached_property
    def _pipeline(self) -> _Pipeline:
        """Made when the first block is needed."""
        assert self._lane is not None
        return _Pipeline(self._reader, self._blocks, self._device, self._lane)


class _Pipeline:
    """Disk → one of two host buffers, in a thread → one of two device buffers, by a lane."""

    def __init__(self, reader: WeightReader, blocks: Sequence[str], device: torch.device, lane: Lane) -> None:
        self._reader = reader
        self._lane = lane
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights")
        self._layouts = {block: Layout({n: reader.declared(n) for n in reader.inside(block)}) for block in blocks}
        largest = max(layout.nbytes for layout in self._layouts.values())
        self._host = [host_buffer(largest, self if device.type == "cuda" else None, device) for _ in range(2)]
        self._copied: list[Any] = [None, None]  # the last copy out of each host buffer
        self._on_device = DoubleBuffer(largest, device, lane)
        self._reading: Future[None] | None = None

    def start(self, block: str) -> None:
        """Begin to read a block, unless it is there or another is being read."""
        if self._reading is None and not self._on_device.holds(block):
            self._reading = self._thread.submit(self._read, block)

    def take(self, block: str) -> dict[str, torch.Tensor]:
        """The block's tensors on the device. Raises what reading it raised."""
        self._finish_reading()
        self.start(block)
        self._finish_reading()
        return self._layouts[block].views(self._on_device.take(block))

    def release(self) -> None:
        self._on_device.release()

    def _finish_reading(self) -> None:
        if self._reading is not None:
            future, self._reading = self._reading, None
            future.result()

    def _read(self, block: str) -> None:
        """In the thread, which touches a host buffer only when the copy out of it is over."""
        self._host.reverse()
        self._copied.reverse()
        if self._copied[0] is not None:
            self._lane.finish(self._copied[0])
        layout, buffer = self._layouts[block], self._host[0]
        for name, tensor in self._reader.read(layout.places):
            layout.view(buffer, name).copy_(tensor)
        self._copied[0] = self._on_device.start(block, buffer[: layout.nbytes])
