"""Choose the linear layers that get an adapter, by PEFT's rules."""

from __future__ import annotations

import re
from collections import Counter

import torch
from torch import nn

from .config import ALL_LINEAR
from .errors import ConfigError, ModelError


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is stored (in, out). By name: transformers need not be imported."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def layer_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer, whichever way its weight is stored."""
    assert isinstance(module.weight, torch.Tensor)
    first, second = module.weight.shape
    return (second, first) if is_conv1d(module) else (first, second)


def select_targets(
    model: nn.Module,
    target_modules: str | tuple[str, ...],
    exclude_modules: str | tuple[str, ...] = (),
    saved: tuple[str, ...] = (),
) -> dict[str, nn.Module]:
    """The linear layers to adapt, by name, in module order.

    "all-linear" takes every linear layer but the output embedding; a tuple takes the modules whose full name or
    dotted ending is in it; any other string is a regular expression for the full name.
    saved: modules that the adapter holds as a whole (a classifier's head); what is in them is no candidate.
    Raises ModelError, listing candidates, where nothing matches, or one of the names nothing; ConfigError for a bad
    regular expression.
    """
    whole = tuple(f"{name}." for name in saved)
    linear = {
        name: module for name, module in model.named_modules() if is_linear(module) and not f"{name}.".startswith(whole)
    }
    _check_names(target_modules, linear, linear)
    _check_names(exclude_modules, dict(model.named_modules()), linear)
    if target_modules == ALL_LINEAR:
        head = _output_embedding(model)
        chosen = {name: module for name, module in linear.items() if module is not head}
    else:
        chosen = {name: module for name, module in linear.items() if _matches(name, target_modules)}
    chosen = {name: module for name, module in chosen.items() if not _matches(name, exclude_modules)}
    if not chosen:
        wanted = target_modules if isinstance(target_modules, str) else ",".join(target_modules)
        without = f" without {exclude_modules!r}" if exclude_modules else ""
        raise ModelError(
            f"no linear layer matches target modules {wanted!r}{without}{_whole_name_hint(linear, target_modules)};"
            f" there are: {_candidates(linear)}"
        )
    return chosen


def _check_names(wanted: str | tuple[str, ...], modules: dict[str, nn.Module], linear: dict[str, nn.Module]) -> None:
    """A name in a list that matches none of `modules` is misspelt. PEFT lets it pass if another one matches."""
    for ending in wanted if isinstance(wanted, tuple) else ():
        if not any(_matches(name, (ending,)) for name in modules):
            raise ModelError(f"no layer is called {ending!r}; there are: {_candidates(linear)}")


def _matches(name: str, wanted: str | tuple[str, ...]) -> bool:
    if isinstance(wanted, tuple):
        return any(name == ending or name.endswith(f".{ending}") for ending in wanted)
    if not wanted:
        return False
    try:
        return re.fullmatch(wanted, name) is not None
    except re.error as error:
        raise ConfigError(f"{wanted!r} is not a regular expression: {error}") from error


def _whole_name_hint(linear: dict[str, nn.Module], wanted: str | tuple[str, ...]) -> str:
    """A remedy where a regular expression matches a part of a name only."""
    if isinstance(wanted, tuple) or wanted == ALL_LINEAR or not any(re.search(wanted, name) for name in linear):
        return ""
    return f": it has to match a whole name, as '.*({wanted})' does"


def _output_embedding(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return head if isinstance(head, nn.Module) else None


def _candidates(linear: dict[str, nn.Module]) -> str:
    """Last parts of the names with how often they occur: "q_proj (30), k_proj (30)"."""
    counts = Counter(name.rpartition(".")[2] for name in linear)
    return ", ".join(f"{name} ({count})" for name, count in counts.items()) or "none"
