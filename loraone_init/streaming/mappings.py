"""Blocks that hand tensors on in a mapping that all of them are given, such as the keys and values of Gemma 3n.

What a block writes there is an output that its return value does not show. Here it becomes one, so that gradients
reach the block that wrote, from all that read.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Mapping
from typing import Any

Written = dict[str, dict[Any, Any]]
"""By the name of the mapping: what a block wrote there, by key."""


def as_dicts(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments in which every mapping is a dict of its own, whose tensors `torch.utils._pytree` finds."""
    return {name: dict(value) if isinstance(value, (dict, UserDict)) else value for name, value in kwargs.items()}


def run_with_mappings(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, Written]:
    """forward(*args, **kwargs) on copies of the mappings in kwargs, and what it wrote there."""
    copies = as_dicts(kwargs)
    outputs = forward(*args, **copies)
    written = {}
    for name, before in kwargs.items():
        if isinstance(before, dict):
            new = {key: value for key, value in copies[name].items() if key not in before or before[key] is not value}
            if new:
                written[name] = new
    return outputs, written


def write_back(kwargs: Mapping[str, Any], written: Written) -> None:
    """Put into the model's own mappings what a block wrote into copies of them."""
    for name, content in written.items():
        kwargs[name].update(content)
