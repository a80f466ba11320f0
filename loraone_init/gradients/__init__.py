"""Losses and exact weight gradients, G = Σ dYᵀX / N, one block's layers alive at a time.

May import `streaming` and what stands below it.
"""

from __future__ import annotations

from .causal_lm import CausalLM
from .classification import SequenceClassification
from .losses import RowLosses
from .objective import LossFunction, Objective, WholeModel
from .seq2seq_lm import Seq2SeqLM
from .stream import stream_gradients, stream_losses

__all__ = [
    "CausalLM",
    "LossFunction",
    "Objective",
    "RowLosses",
    "Seq2SeqLM",
    "SequenceClassification",
    "WholeModel",
    "stream_gradients",
    "stream_losses",
]
