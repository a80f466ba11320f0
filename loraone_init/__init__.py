"""LoRA-One initialisation: the exact one-step gradient of a model, block by block, as a LoRA adapter.

The names below are the public interface; each is imported when it is first used, so that the command line answers
quickly.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .adapter import Adapter
    from .config import InitConfig
    from .data import DataOptions, load_batches
    from .errors import LoraOneError
    from .initialization import initialize
    from .linalg import LoraPair, spectral_init, truncated_svd
    from .models import open_model
    from .optim import PreconditionedAdamW

_HOMES = {
    "Adapter": "adapter",
    "DataOptions": "data",
    "InitConfig": "config",
    "LoraOneError": "errors",
    "LoraPair": "linalg",
    "PreconditionedAdamW": "optim",
    "initialize": "initialization",
    "load_batches": "data",
    "open_model": "models",
    "spectral_init": "linalg",
    "truncated_svd": "linalg",
}

__all__ = [
    "Adapter",
    "DataOptions",
    "InitConfig",
    "LoraOneError",
    "LoraPair",
    "PreconditionedAdamW",
    "__version__",
    "initialize",
    "load_batches",
    "open_model",
    "spectral_init",
    "truncated_svd",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
