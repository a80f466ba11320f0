"""MODEL opened: its source, its skeleton without weights, its blocks, its head, and where its weights go.

May import `data` (for labels), `layers`, `weights` and `linalg`.
"""

from __future__ import annotations

from .opening import OpenModel, open_model, open_module
from .placement import Place, Placement
from .sources import LocalModel, resolve_model

__all__ = ["LocalModel", "OpenModel", "Place", "Placement", "open_model", "open_module", "resolve_model"]
