"""The reference trainer: an adapter trained with preconditioned AdamW on top of transformers' Trainer and PEFT, with
checkpoints that a run can be resumed from.

May import `choosing`, `inspection` and what stands below them. PEFT and accelerate are needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import hand_on

if TYPE_CHECKING:
    from .options import TrainOptions
    from .trainer import Outcome, train

__getattr__ = hand_on(__name__, {"Outcome": "trainer", "TrainOptions": "options", "train": "trainer"})

__all__ = ["Outcome", "TrainOptions", "train"]
