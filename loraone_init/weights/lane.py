"""Copies beside the computation: two buffers on the device, of which one is filled while the other is computed with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Lane(Protocol):
    """A queue of copies beside the queue of the computation. A mark is a point in one of the two."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> Any:
        """Queue a copy, to begin when the computation has passed the mark `after`; the mark of its end."""
        ...

    def mark(self) -> Any:
        """The point that the computation's queue has come to."""
        ...

    def wait(self, copied: Any) -> None:
        """What is computed from now on comes after that copy."""
        ...

    def finish(self, copied: Any) -> None:
        """Wait, on the CPU, until that copy is over."""
        ...


class CudaLane:
    """A side stream. Host memory has to be pinned."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: torch.cuda.Event) -> torch.cuda.Event:
        self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            end: torch.cuda.Event = self._stream.record_event()
        return end

    def mark(self) -> torch.cuda.Event:
        point: torch.cuda.Event = torch.cuda.current_stream(self._device).record_event()
        return point

    def wait(self, copied: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(copied)

    def finish(self, copied: torch.cuda.Event) -> None:
        copied.synchronize()


@dataclass
class _Slot:
    """One of the two buffers: who is in it or on the way, the end of its copy, and when it was last computed with."""

    buffer: torch.Tensor
    free: Any
    block: str | None = None
    copied: Any = None


class DoubleBuffer:
    """Two buffers (nbytes,) on the device. They are reused, never freed in between: at most two blocks are there."""

    def __init__(self, nbytes: int, device: torch.device, lane: Lane) -> None:
        self._lane = lane
        buffers = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(2)]
        self._slots = [_Slot(buffer, lane.mark()) for buffer in buffers]
        self._in_use: _Slot | None = None

    def holds(self, block: str) -> bool:
        """Whether the block is there or on its way."""
        return any(slot.block == block for slot in self._slots)

    def start(self, block: str, source: torch.Tensor) -> Any:
        """Begin to copy the bytes of a block into the buffer that is not computed with; the mark of the copy's end."""
        slot = next(slot for slot in self._slots if slot is not self._in_use)
        slot.block = block
        slot.copied = self._lane.copy(slot.buffer[: source.numel()], source, slot.free)
        return slot.copied

    def take(self, block: str) -> torch.Tensor:
        """The buffer with the block's bytes, for what is computed from now on."""
        slot = next(slot for slot in self._slots if slot.block == block)
        self._lane.wait(slot.copied)
        self._in_use = slot
        return slot.buffer

    def release(self) -> None:
        """The block taken is not needed for what is computed from now on; its bytes stay until they are overwritten."""
        assert self._in_use is not None
        self._in_use.free = self._lane.mark()
        self._in_use = None
