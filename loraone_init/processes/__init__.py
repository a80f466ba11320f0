"""Several processes that share the work: the one that runs alone, and those that torchrun has started.

May import `linalg`.
"""

from __future__ import annotations

from .processes import Alone, Processes, joined

__all__ = ["Alone", "Processes", "joined"]
