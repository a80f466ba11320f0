"""Find a model's blocks: the repeated layers whose weights are streamed one at a time."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..errors import ModelError
from ..json_files import shown
from ..layers.language import outside_language
from ..layers.targets import is_linear
from ..transformers_private import is_checkpointing_layer, unsplit_classes


def find_blocks(model: nn.Module, block_path: str | None = None) -> list[str]:
    """Names of the model's blocks in module order; [] where none can be told.

    The children of `block_path` if it is given; else the first of these that finds any in the language model: module
    lists whose members are all of the class that transformers has for layers with checkpointed activations; modules of
    the classes that the model says must not be split over devices; in a transformers model, module lists whose members
    are of one class and have linear layers, two or more members if there are such lists. Of nested candidates the
    outermost counts.
    """
    if block_path is not None:
        return _children_of(model, block_path)
    beside = tuple(f"{name}." for name in outside_language(model))
    found: list[str] = []
    for candidates in (_checkpointed(model), _unsplit(model), _alike(model, 2), _alike(model, 1)):
        found = found or candidates
        if any(not name.startswith(beside) for name in candidates):
            return _outermost(candidates)
    return _outermost(found)


def _checkpointed(model: nn.Module) -> list[str]:
    return _members(model, lambda members: all(map(is_checkpointing_layer, members)))


def _unsplit(model: nn.Module) -> list[str]:
    classes = unsplit_classes(model)
    return [name for name, module in model.named_modules() if name and type(module).__name__ in classes]


def _alike(model: nn.Module, at_least: int) -> list[str]:
    """Of lists of at least so many members; [] for a module that is no transformers model, and may call them anyhow."""
    if not hasattr(model, "get_input_embeddings"):
        return []

    def is_wanted(members: list[nn.Module]) -> bool:
        alike = len({type(member) for member in members}) == 1 and len(members) >= at_least
        uncalled = isinstance(members[0], (nn.ModuleList, nn.ModuleDict))
        return alike and not uncalled and all(any(map(is_linear, member.modules())) for member in members)

    return _members(model, is_wanted)


def _members(model: nn.Module, is_wanted: Callable[[list[nn.Module]], bool]) -> list[str]:
    """Names of the members of all module lists whose members are wanted."""
    return [
        f"{name}.{child}"
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and is_wanted(list(module))
        for child, _ in module.named_children()
    ]


def describe_module_lists(model: nn.Module) -> str:
    """The module lists a user could name as block path, for an error message."""
    lists = [
        f"{name} ({len(module)})"
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and name
    ]
    return ", ".join(lists[:10]) or "none"


def _children_of(model: nn.Module, path: str) -> list[str]:
    try:
        parent = model.get_submodule(path) if path else None
    except AttributeError:
        parent = None
    children = dict(parent.named_children()) if parent is not None else {}
    uncalled = [name for name, child in children.items() if isinstance(child, (nn.ModuleList, nn.ModuleDict))]
    if not children or uncalled:
        why = f": {uncalled[0]} in it is a list itself" if uncalled else ""
        raise ModelError(
            f"block path {shown(path)} names no module list{why}; there are: {describe_module_lists(model)}"
        )
    return [f"{path}.{name}" for name in children]


def _outermost(names: list[str]) -> list[str]:
    chosen = set(names)
    return [name for name in names if not any(parent in chosen for parent in parents(name))]


def parents(name: str) -> list[str]:
    """Names of the modules that a module is in, the outermost first, without the model itself."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]
