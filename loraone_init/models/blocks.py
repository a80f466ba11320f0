"""Find a model's blocks: the repeated layers whose weights are streamed one at a time."""

from __future__ import annotations

from torch import nn

from ..errors import ModelError
from ..json_files import shown
from ..transformers_private import is_checkpointing_layer, unsplit_classes


def find_blocks(model: nn.Module, block_path: str | None = None) -> list[str]:
    """Names of the model's blocks in module order; [] where none can be told.

    In this order: the children of `block_path` if it is given; module lists whose members are all of the class that
    transformers has for layers with checkpointed activations; modules of the classes that the model says must not be
    split over devices. Of nested candidates the outermost counts.
    """
    if block_path is not None:
        return _children_of(model, block_path)
    lists = [
        f"{name}.{child}"
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(map(is_checkpointing_layer, module))
        for child, _ in module.named_children()
    ]
    if lists:
        return _outermost(lists)
    classes = unsplit_classes(model)
    return _outermost([name for name, module in model.named_modules() if name and type(module).__name__ in classes])


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
