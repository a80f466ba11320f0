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
    configs = {id(config): config for module in model.modules() if hasattr(config := _config(module), "use_cache")}
    before = {key: config.use_cache for key, config in configs.items()}
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for key, config in configs.items():
            config.use_cache = before[key]


def _config(module: nn.Module) -> Any:
    return getattr(module, "config", None)
