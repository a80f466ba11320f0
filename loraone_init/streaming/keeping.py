"""Tensors kept for later: on the device while they fit, then in pinned host memory, then in a temporary file.

What passes between blocks is kept here: the inputs of every block from the forward to the backward, the upstream
gradients, and what waits at a block until its micro-batch goes on. What comes back equals what went in, bit for bit.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import ModelError
from .scratch import ScratchFile

logger = logging.getLogger(__name__)

Tier = Literal["device", "host", "disk"]
_WHERE: dict[Tier, str] = {"host": "pinned host memory", "disk": "a temporary file"}


class Kept:
    """One tensor in keeping. Its room is free again when this object is gone."""

    def __init__(self, keeper: Keeper, tier: Tier, nbytes: int, content: Any, like: torch.Tensor) -> None:
        """content: the tensor itself, or a flat copy on the host, or an offset in the file."""
        self.tier = tier
        self.nbytes = nbytes
        self._keeper = keeper
        self._content = content
        self._device, self._dtype = like.device, like.dtype
        self._shape, self._stride = like.shape, like.stride()
        self._version = like._version

    @property
    def is_changed(self) -> bool:
        """Whether somebody has changed the tensor in place; one that was moved off the device is a copy of our own."""
        return self.tier == "device" and self._content._version != self._version

    def get(self) -> torch.Tensor:
        """The tensor on its device, detached. Where it was moved off, this is a fresh copy; else it is the one put.

        Raises ModelError where that has been changed since.
        """
        if self.is_changed:
            raise ModelError(
                "a tensor that passes between blocks is changed in place while it waits; have the model make a new one"
            )
        if self.tier == "device":
            assert isinstance(self._content, torch.Tensor)
            return self._content
        flat = self._flat().to(self._device, non_blocking=True)
        return flat.as_strided(self._shape, self._stride)

    def refill(self, storage: torch.UntypedStorage) -> None:
        """Put the bytes back into a storage of a tensor from `get` that was emptied."""
        storage.resize_(self._shape.numel() * self._dtype.itemsize)
        flat = torch.empty(0, dtype=self._dtype, device=self._device).set_(storage)
        flat.copy_(self._flat(), non_blocking=True)

    def _flat(self) -> torch.Tensor:
        if self.tier == "host":
            assert isinstance(self._content, torch.Tensor)
            return self._content
        return self._keeper.file().read(self._content, self._shape.numel(), self._dtype)

    def __del__(self) -> None:
        self._keeper._release(self)


class Keeper:
    """Decides where tensors are kept, by what there is room for.

    device_bytes: for what is kept on the device; on a CPU, in memory. None: all of it.
    host_bytes:   for what is kept in host memory beside a GPU; None: all of the rest. On a CPU the rest goes to disk.
    held, most:   bytes in each tier, now and at most.
    too_many_tokens: of a micro-batch, as was found out; None: nothing was too much so far.
    """

    def __init__(self, device_bytes: int | None = None, host_bytes: int | None = None) -> None:
        self._limits: dict[Tier, int | None] = {"device": device_bytes, "host": host_bytes, "disk": None}
        self.too_many_tokens: int | None = None
        self._file: ScratchFile | None = None
        self._known = WeakTensorKeyDictionary()
        self.held: Counter[Tier] = Counter()
        self.most: Counter[Tier] = Counter()

    def put(self, tensor: torch.Tensor) -> Kept:
        """Keep a tensor, which must not be changed in place: where it stays on the device, that is noticed.

        A tensor object that is here already, and unchanged, is kept once.
        """
        kept, version = self._known.get(tensor, (None, None))
        if kept is None or version != tensor._version:
            kept = self._keep(tensor.detach())
            self._known[tensor] = kept, tensor._version
        assert isinstance(kept, Kept)
        return kept

    def note(self, tensor: torch.Tensor, kept: Kept) -> None:
        """`tensor` has the content of `kept`: putting it again keeps nothing more."""
        self._known[tensor] = kept, tensor._version

    def file(self) -> ScratchFile:
        if self._file is None:
            self._file = ScratchFile()
        return self._file

    def close(self) -> None:
        """Give up the file. What is kept in it is lost."""
        if self._file is not None:
            self._file.close()

    def _keep(self, tensor: torch.Tensor) -> Kept:
        nbytes = tensor.nbytes
        if self._fits("device", nbytes) or not _is_dense(tensor):  # an expanded mask takes less where it is
            return self._hold("device", nbytes, tensor, tensor)
        flat = tensor.as_strided((tensor.numel(),), (1,))
        pinned = _pinned_size(nbytes)
        if tensor.device.type == "cuda" and self._fits("host", pinned):
            copy = torch.empty_like(flat, device="cpu", pin_memory=True)
            return self._hold("host", pinned, copy.copy_(flat, non_blocking=True), tensor)
        return self._hold("disk", nbytes, self.file().write(flat.cpu()), tensor)

    def _hold(self, tier: Tier, nbytes: int, content: Any, like: torch.Tensor) -> Kept:
        if tier != "device" and not self.most[tier]:
            logger.info("Block inputs that do not fit beside the weights go to %s", _WHERE[tier])
        self.held[tier] += nbytes
        self.most[tier] = max(self.most[tier], self.held[tier])
        return Kept(self, tier, nbytes, content, like)

    def _fits(self, tier: Tier, nbytes: int) -> bool:
        limit = self._limits[tier]
        return limit is None or self.held[tier] + nbytes <= limit

    def _release(self, kept: Kept) -> None:
        self.held[kept.tier] -= kept.nbytes
        if kept.tier == "disk":
            self.file().free(kept._content, kept.nbytes)


@contextmanager
def keeping(device_bytes: int | None = None, host_bytes: int | None = None) -> Iterator[Keeper]:
    """A keeper whose file is gone after, also after an error."""
    keeper = Keeper(device_bytes, host_bytes)
    try:
        yield keeper
    finally:
        keeper.close()


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements are those of one stretch of memory, each once, in whatever order."""
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def _pinned_size(nbytes: int) -> int:
    """What torch's pinned allocator takes: a power of two."""
    return 1 << max(0, nbytes - 1).bit_length()
