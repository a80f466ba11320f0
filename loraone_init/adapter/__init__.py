"""The adapter: its factors, its record, the file it is saved in, PEFT's configuration, and the model card.
docs/format.md specifies the file.

May import `layers` and `linalg`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import hand_on

if TYPE_CHECKING:
    from .adapter import Adapter
    from .records import GrowthReport, GrowthStage, LayerReport, LossReport, Preconditioner

__getattr__ = hand_on(
    __name__,
    {
        "Adapter": "adapter",
        "GrowthReport": "records",
        "GrowthStage": "records",
        "LayerReport": "records",
        "LossReport": "records",
        "Preconditioner": "records",
    },
)

__all__ = ["Adapter", "GrowthReport", "GrowthStage", "LayerReport", "LossReport", "Preconditioner"]
