"""Preconditioned AdamW for LoRA factors. It works in any training loop, with any adapter.

May import `adapter`, `layers` and `linalg`.
"""

from __future__ import annotations

from .adamw import PreconditionedAdamW
from .creating import create_optimizer
from .hooks import StepHooks, precondition_steps
from .pairing import find_pairs, peft_pairs
from .preconditioning import precondition
from .stacking import FactorPair

__all__ = [
    "FactorPair",
    "PreconditionedAdamW",
    "StepHooks",
    "create_optimizer",
    "find_pairs",
    "peft_pairs",
    "precondition",
    "precondition_steps",
]
