"""How γ, the size of the sample and the ranks of the layers are chosen by measurement. docs/choosing.md explains the
rules.

May import `gradients` and what stands below it.
"""

from __future__ import annotations

from .gamma import find_gamma
from .growing import grow
from .rank_allotment import allot, choose_ranks
from .sample_size import Growth

__all__ = ["Growth", "allot", "choose_ranks", "find_gamma", "grow"]
