"""What an adapter tells of itself: facts by layer, tables for the terminal, a page with pictures, the comparison of
two adapters.

May import `adapter` and what stands below it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import hand_on

if TYPE_CHECKING:
    from .comparison import Comparison, compare_adapters
    from .facts import Anomaly, LayerFacts, find_anomalies, layer_facts
    from .page import render_page

__getattr__ = hand_on(
    __name__,
    {
        "Anomaly": "facts",
        "Comparison": "comparison",
        "LayerFacts": "facts",
        "compare_adapters": "comparison",
        "find_anomalies": "facts",
        "layer_facts": "facts",
        "render_page": "page",
    },
)

__all__ = ["Anomaly", "Comparison", "LayerFacts", "compare_adapters", "find_anomalies", "layer_facts", "render_page"]
