"""Blocks that hand tensors on in a dict or list that all of them are given, such as the keys and values of Gemma 3n.

What a block writes there is an output that its return value does not show. Here it becomes one, so that gradients
reach the block that wrote, from all that read.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

from ..errors import ModelError

Written = dict[int | str, dict[Any, Any]]
"""By the argument's position or name: what a block wrote into that dict or list, by key or index."""


def as_dicts(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments in which every mapping is a dict of its own, whose tensors `torch.utils._pytree` finds."""
    named = {name: dict(value) if isinstance(value, (dict, UserDict)) else value for name, value in kwargs.items()}
    return tuple(dict(value) if isinstance(value, UserDict) else value for value in args), named


def run_with_mappings(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, Written]:
    """forward(*args, **kwargs) on copies of the dicts and lists among them, and what it wrote there.

    Raises ModelError where it takes something out of one of them.
    """
    given: dict[int | str, Any] = dict(chain(enumerate(args), kwargs.items()))
    copies = {place: value.copy() if type(value) in (dict, list) else value for place, value in given.items()}
    outputs = forward(*(copies[i] for i in range(len(args))), **{name: copies[name] for name in kwargs})
    written: Written = {}
    for place, before in given.items():
        if type(before) in (dict, list) and (new := _new(place, _by_key(before), _by_key(copies[place]))):
            written[place] = new
    return outputs, written


def write_back(args: tuple[Any, ...], kwargs: Mapping[str, Any], written: Written) -> None:
    """Put into the model's own dicts and lists what a block wrote into copies of them."""
    for place, content in written.items():
        target = args[place] if isinstance(place, int) else kwargs[place]
        if not isinstance(target, list):
            target.update(content)
            continue
        for index, value in content.items():
            target[index : index + 1] = [value]  # appends at the end


def _by_key(container: dict[Any, Any] | list[Any]) -> dict[Any, Any]:
    return container if isinstance(container, dict) else dict(enumerate(container))


def _new(place: int | str, before: Mapping[Any, Any], after: Mapping[Any, Any]) -> dict[Any, Any]:
    if before.keys() - after.keys():
        raise ModelError(
            f"a block takes something out of its argument {place}, which other blocks read; have it return what is"
            " left, or run the model without block_path"
        )
    return {key: value for key, value in after.items() if key not in before or before[key] is not value}
