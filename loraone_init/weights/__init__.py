"""The tensors of a checkpoint, and where a block's weights are between its uses: on the device, in host memory, or in
the checkpoint on disk.

May import none of the other packages.
"""

from __future__ import annotations

from .base import ResidentStore, WeightStore, get_tensor, set_tensor
from .checkpoint import Checkpoint
from .disk import DiskStore
from .host import HostStore
from .reader import WeightReader

__all__ = [
    "Checkpoint",
    "DiskStore",
    "HostStore",
    "ResidentStore",
    "WeightReader",
    "WeightStore",
    "get_tensor",
    "set_tensor",
]
