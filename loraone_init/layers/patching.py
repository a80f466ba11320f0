"""Change how a model behaves for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`module(...)` runs `forward(...)` inside the context; what was there before is put back."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Inside, a transformers model keeps no keys and values between calls: a block that is computed again would add
    its own to them once more.
    """
    with _configured(model, ("use_cache",)):
        yield


@contextmanager
def only_last_states(model: nn.Module) -> Iterator[None]:
    """Inside, a transformers model neither keeps keys and values nor collects what its blocks compute on the way, for
    objectives that read nothing but its last hidden states.
    """
    with _configured(model, ("use_cache", "output_attentions", "output_router_logits")):
        yield


@contextmanager
def _configured(model: nn.Module, flags: tuple[str, ...]) -> Iterator[None]:
    """Inside, these flags are off in the configurations of all parts of the model that have them."""
    configs = {id(config): config for module in model.modules() if (config := _config(module)) is not None}
    before = [
        (config, flag, getattr(config, flag)) for config in configs.values() for flag in flags if hasattr(config, flag)
    ]
    for config, flag, _ in before:
        setattr(config, flag, False)
    try:
        yield
    finally:
        for config, flag, value in before:
            setattr(config, flag, value)


def _config(module: nn.Module) -> Any:
    return getattr(module, "config", None)
