"""Which layers of a model are adapted, their sizes, fused experts, and PEFT's names for all of them.

May import `linalg`.
"""

from __future__ import annotations

from .targets import is_linear, layer_shape, select_targets

__all__ = ["is_linear", "layer_shape", "select_targets"]
