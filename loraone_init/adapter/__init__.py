"""The adapter: its factors, its record, the file it is saved in, PEFT's configuration, and the model card.
docs/format.md specifies the file.

May import `layers` and `linalg`.
"""

from __future__ import annotations

from .adapter import Adapter
from .records import GrowthReport, GrowthStage, LayerReport, LossReport, Preconditioner

__all__ = ["Adapter", "GrowthReport", "GrowthStage", "LayerReport", "LossReport", "Preconditioner"]
