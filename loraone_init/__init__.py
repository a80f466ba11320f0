"""LoRA-One initialisation: the exact one-step gradient of a model, block by block, as a LoRA adapter.

The names below are the public interface; each is imported when it is first used, so that the command line answers
quickly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy import hand_on
from .version import __version__

if TYPE_CHECKING:
    from .adapter import Adapter, Preconditioner
    from .choosing import Growth
    from .config import InitConfig, RankBudget
    from .data import DataOptions, Sample, load_batches, load_sample
    from .errors import LoraOneError
    from .initialization import initialize
    from .linalg import LoraPair, spectral_init, truncated_svd
    from .models import OpenModel, open_model
    from .optim import PreconditionedAdamW

_HOMES = {
    "Adapter": "adapter",
    "DataOptions": "data",
    "Growth": "choosing",
    "InitConfig": "config",
    "LoraOneError": "errors",
    "OpenModel": "models",
    "PreconditionedAdamW": "optim",
    "Preconditioner": "adapter",
    "RankBudget": "config",
    "Sample": "data",
    "initialize": "initialization",
    "load_sample": "data",
    "open_model": "models",
    # Older names, kept for one release: now `load_sample`, and what `loraone_init.linalg` has.
    "LoraPair": "linalg",
    "load_batches": "data",
    "spectral_init": "linalg",
    "truncated_svd": "linalg",
}

__all__ = [
    "Adapter",
    "DataOptions",
    "Growth",
    "InitConfig",
    "LoraOneError",
    "LoraPair",
    "OpenModel",
    "PreconditionedAdamW",
    "Preconditioner",
    "RankBudget",
    "Sample",
    "__version__",
    "initialize",
    "load_batches",
    "load_sample",
    "open_model",
    "spectral_init",
    "truncated_svd",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


__getattr__ = hand_on(__name__, _HOMES)
