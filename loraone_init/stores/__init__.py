"""Where a block's weights are between its uses: on the device, in host memory, or in the checkpoint on disk."""

from .base import ResidentStore, WeightStore, get_tensor, set_tensor
from .disk import DiskStore
from .host import HostStore
from .reader import WeightReader

__all__ = ["DiskStore", "HostStore", "ResidentStore", "WeightReader", "WeightStore", "get_tensor", "set_tensor"]
