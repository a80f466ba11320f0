"""The main job put together: the passes over the data, the decomposition of each layer's gradient, the start of each
layer, the loss before and after the step, and the memory that all of it takes.

May import every package but `cli`, `exporters` and `training`.
"""

from __future__ import annotations

from .estimate import estimate_memory, estimate_seconds
from .initialize import initialize

__all__ = ["estimate_memory", "estimate_seconds", "initialize"]
