"""How γ, the size of the sample and the ranks of the layers are chosen by measurement. docs/choosing.md explains the
rules.

May import `gradients` and what stands below it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import hand_on

if TYPE_CHECKING:
    from .gamma import find_gamma
    from .growing import grow
    from .rank_allotment import allot, choose_ranks
    from .sample_size import Growth

__getattr__ = hand_on(
    __name__,
    {
        "Growth": "sample_size",
        "allot": "rank_allotment",
        "choose_ranks": "rank_allotment",
        "find_gamma": "gamma",
        "grow": "growing",
    },
)

__all__ = ["Growth", "allot", "choose_ranks", "find_gamma", "grow"]
