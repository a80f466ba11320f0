"""The reference trainer: an adapter trained with preconditioned AdamW on top of transformers' Trainer and PEFT, with
checkpoints that a run can be resumed from.

May import `choosing`, `inspection` and what stands below them. PEFT and accelerate are needed.
"""

from __future__ import annotations

from .trainer import Outcome, TrainOptions, train

__all__ = ["Outcome", "TrainOptions", "train"]
