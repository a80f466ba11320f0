"""What a model changes behind the back of the streaming, noticed and refused by name."""

from __future__ import annotations

from ..errors import ModelError


def changed_after(what: str, block: str) -> ModelError:
    """what: an input, or what the block computed; it was needed for the block's backward as it was."""
    return ModelError(
        f"{what} of block {block} is changed in place after the block was called, and its backward needs what was"
        " there; have the model make a new tensor: h = h + block(h), not h += block(h)"
    )
