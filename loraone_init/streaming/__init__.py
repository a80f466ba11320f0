"""A model run block by block: how the calls of its blocks are intercepted, what is kept between them, and the way
back.

May import `models` and what stands below it. It knows nothing of losses and layers.
"""

from __future__ import annotations

from .driver import stream_backward, stream_forward
from .keeping import Keeper, keeping
from .stack import BlockStack

__all__ = ["BlockStack", "Keeper", "keeping", "stream_backward", "stream_forward"]
