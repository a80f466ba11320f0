"""What a model changes behind the back of the streaming, noticed and refused by name.

A block is computed from its arguments, perhaps twice, and micro-batches take turns at it. So all that it hands on has
to be in what it returns, or in a dict or list that it is given (see `mappings`). Tensors that it leaves elsewhere, in
its attributes, in an object that it is given, or in a context variable, would be another micro-batch's when they are
read, and no gradient would pass through them.
"""

from __future__ import annotations

import contextvars
import sys
from collections import UserDict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import ModelError

_DEPTH = 6  # of containers in containers that are looked into
_PLAIN = (int, float, complex, str, bytes, type(None))
_CLOSED = (type, FunctionType, BuiltinFunctionType, MethodType, ModuleType, nn.Module, torch.dtype, torch.device)
_BUFFER, _CONTEXT = "the buffer ", "the context variable "
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__) | {"forward"}

Leaves = dict[str, tuple[Any, int | None]]
"""What is found in objects, by the way there ("state.keys[0]"), and its version if it is a tensor."""


def leaves_of(named: Mapping[str, Any]) -> Leaves:
    """All that is in these values: in lists, tuples, sets and mappings, and in the attributes of objects."""
    found: Leaves = {}
    seen: set[int] = set()
    for name, value in named.items():
        for path, leaf in _walk(name, value, seen, _DEPTH):
            found[path] = leaf, leaf._version if isinstance(leaf, torch.Tensor) else None
    return found


def first_difference(before: Leaves, after: Leaves) -> str | None:
    """The first way to something that is new, gone, another one, or changed in place."""
    for path in [*after, *before]:
        (old, old_version), (new, new_version) = (leaves.get(path, (_NOTHING, None)) for leaves in (before, after))
        same = old is new or (isinstance(old, _PLAIN) and type(old) is type(new) and old == new)
        if not same or old_version != new_version:
            return path
    return None


class Objects:
    """Of a block's flattened inputs or outputs, those into which pytree does not look, as they are now."""

    def __init__(self, flat: Sequence[Any]) -> None:
        known = (torch.Tensor, *_PLAIN, *_CLOSED)
        others = [value for value in flat if not isinstance(value, known)]
        self._named = {f"{type(value).__name__} ({number})": value for number, value in enumerate(others, 1)}
        self._leaves = leaves_of(self._named)

    def change(self) -> str | None:
        """The way to something in them that has been changed since."""
        return first_difference(self._leaves, leaves_of(self._named))

    def tensors(self) -> dict[str, torch.Tensor]:
        return {path: leaf for path, (leaf, _) in self._leaves.items() if isinstance(leaf, torch.Tensor)}


def check_no_gradient_passes(block: str, given: Objects, returned: Objects) -> None:
    """Raises ModelError for a tensor in an object that a gradient would have to pass through.

    block: one that has to be differentiated; given, returned: the objects among its inputs and outputs.
    """
    lost = [path for path, tensor in given.tensors().items() if tensor.requires_grad]
    lost += returned.tensors()
    if lost:
        raise ModelError(
            f"a gradient would have to pass block {block} through an object: {lost[0]}; use an argument of its own, a"
            " list, tuple or dict, or run the model without block_path"
        )


@contextmanager
def nothing_left_behind(block: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """Around a run of a block. Raises ModelError where it changes what it was given, or leaves tensors elsewhere."""
    flat, spec = pytree.tree_flatten((args, kwargs))
    given, state = Objects(flat), _state(module)
    yield
    flat_after, spec_after = pytree.tree_flatten((args, kwargs))
    if spec_after != spec or any(old is not new for old, new in zip(flat, flat_after, strict=True)):
        raise _refused(f"block {block} changes a list or dict inside of its arguments")
    if path := given.change():
        raise _refused(f"block {block} changes an object that it is given: {path}")
    _check_state(block, state, _state(module))


def changed_after(what: str, block: str) -> ModelError:
    """what: an input, or what the block computed; it was needed for the block's backward as it was."""
    return ModelError(
        f"{what} of block {block} is changed in place after the block was called, and its backward needs what was"
        " there; have the model make a new tensor: h = h + block(h), not h += block(h)"
    )


_NOTHING = object()


def _walk(path: str, value: Any, seen: set[int], depth: int) -> Iterator[tuple[str, Any]]:
    """(way, value) of all that is no container."""
    if isinstance(value, (torch.Tensor, *_PLAIN, *_CLOSED)):
        yield path, value
        return
    if id(value) in seen or not depth:
        return
    seen.add(id(value))
    yield f"{path} itself", value
    inside = _inside(value)
    yield f"{path}'s size", len(inside)
    for step, part in inside.items():
        yield from _walk(path + step, part, seen, depth - 1)


def _inside(value: Any) -> dict[str, Any]:
    """What a container or object holds, by the step that leads to it."""
    if isinstance(value, (Mapping, UserDict)):
        return {f"[{key!r}]": part for key, part in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return {f"[{index}]": part for index, part in enumerate(value)}
    if isinstance(value, (set, frozenset)):
        return {f"[{index}]": part for index, part in enumerate(sorted(value, key=id))}
    home = type(value).__module__.partition(".")[0]
    if home in sys.stdlib_module_names and home != "types":  # loggers, locks: they hold no tensors
        return {}
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    attributes = {name: getattr(value, name) for name in slots if name != "__dict__" and hasattr(value, name)}
    return {f".{name}": part for name, part in {**attributes, **getattr(value, "__dict__", {})}.items()}


def _state(module: nn.Module) -> Leaves:
    """The tensors that a block could leave behind: in its modules' attributes and buffers, and in context variables.

    A linear layer's own attributes are a quantization's working state.
    """
    named: dict[str, Any] = {}
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            continue
        prefix = f"{name}." if name else ""
        named |= {f"{prefix}{key}": value for key, value in part.__dict__.items() if key not in _OF_EVERY_MODULE}
        named |= {f"{_BUFFER}{prefix}{key}": value for key, value in part._buffers.items()}
    named |= {f"{_CONTEXT}{variable.name}": value for variable, value in contextvars.copy_context().items()}
    return {path: leaf for path, leaf in leaves_of(named).items() if isinstance(leaf[0], torch.Tensor)}


def _check_state(block: str, before: Leaves, after: Leaves) -> None:
    """A tensor made once, such as a table of cosines, may stay; one that is made anew belongs to a micro-batch."""
    for path, (tensor, version) in after.items():
        old, old_version = before.get(path, (None, None))
        if old is tensor and version == old_version:
            continue
        if path.startswith(_CONTEXT):
            raise ModelError(
                f"block {block} leaves a tensor in {path}, where no gradient passes; have the model not collect"
                " it (output_attentions, output_router_logits)"
            )
        if tensor.requires_grad or (old is not None and not path.startswith(_BUFFER)):
            raise _refused(f"block {block} leaves a tensor in {path}, where micro-batches overwrite each other's")


def _refused(what: str) -> ModelError:
    return ModelError(
        f"{what}; return it from the block, write it into a dict or list that is an argument, or run the model without"
        " block_path"
    )
