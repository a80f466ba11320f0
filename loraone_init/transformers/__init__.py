"""The LoRA-One start inside of transformers' Trainer and TRL's trainers, as a callback.

May import `peft`, `optim` and what stands below them. Inside of this package `import transformers` is that package.
"""

from __future__ import annotations

from .callback import LoraOneCallback

__all__ = ["LoraOneCallback"]
