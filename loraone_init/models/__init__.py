"""MODEL opened: its source, its skeleton without weights, its blocks, its head, and where its weights go.

May import `data` (for labels), `layers`, `weights` and `linalg`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import hand_on

if TYPE_CHECKING:
    from .opening import OpenModel, open_model, open_module
    from .placement import Place, Placement
    from .sources import LocalModel, resolve_model

__getattr__ = hand_on(
    __name__,
    {
        "LocalModel": "sources",
        "OpenModel": "opening",
        "Place": "placement",
        "Placement": "placement",
        "open_model": "opening",
        "open_module": "opening",
        "resolve_model": "sources",
    },
)

__all__ = ["LocalModel", "OpenModel", "Place", "Placement", "open_model", "open_module", "resolve_model"]
