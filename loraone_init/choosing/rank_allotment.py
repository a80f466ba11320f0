"""One number of ranks for all layers, given to each by the spectrum of its gradient.

PEFT takes a rank for each layer (`rank_pattern`), and α with it (`alpha_pattern`). s, and with it the length of the
step, is the same in all layers: that of the average rank.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..layers.expert_layout import expert_names

if TYPE_CHECKING:
    from ..layers.expert_layout import ExpertStack
    from ..linalg.svd import TruncatedSVD


def choose_ranks(svds: Mapping[str, TruncatedSVD], total: int, experts: Mapping[str, ExpertStack]) -> dict[str, int]:
    """The ranks of all layers, `total` in sum, with which they capture most of their gradients.

    What is maximised is the sum over layers of the share of its own ‖G‖²_F that each captures: all have a step of the
    same length, whatever their gradients' (docs/choosing.md has what was measured). Ranks are at most those of the
    decompositions. The experts of one fused parameter share theirs, since their factors are stacked: the sum is then
    `total`, or short of it by less than a rank of all of them.
    """
    stacks = [expert_names({parameter: stack}) for parameter, stack in experts.items()]
    of_experts = {name for names in stacks for name in names}
    groups = [*([name] for name in svds if name not in of_experts), *stacks]
    gains = [_sum_of_gains([svds[name] for name in names]) for names in groups]
    ranks = allot(gains, [len(names) for names in groups], total)
    return {name: rank for names, rank in zip(groups, ranks, strict=True) for name in names}


def allot(gains: Sequence[Sequence[float]], costs: Sequence[float], budget: float) -> list[int]:
    """Ranks r_g ≥ 1 with Σ costs[g]·r_g ≤ budget that maximise Σ_g Σ_{i < r_g} gains[g][i].

    gains[g]: what each further rank brings, descending; there are no more ranks than these. The best gain per cost is
    taken again and again. Since gains descend, those taken at equal costs are the largest of all, so that this is the
    optimum; at different costs it falls short of it by less than the gain of the first that did not fit. Among equal
    gains, as of layers without a gradient, the smaller rank is raised.
    """
    ranks = [1] * len(gains)
    left = budget - sum(costs)

    def place(g: int) -> tuple[float, int, int]:
        return -gains[g][ranks[g]] / costs[g], ranks[g], g

    heap = [place(g) for g in range(len(gains)) if len(gains[g]) > 1]
    heapq.heapify(heap)
    while heap:
        _, _, g = heapq.heappop(heap)
        if costs[g] > left:
            continue  # nor will it fit later
        left -= costs[g]
        ranks[g] += 1
        if ranks[g] < len(gains[g]):
            heapq.heappush(heap, place(g))
    return ranks


def _sum_of_gains(svds: Sequence[TruncatedSVD]) -> list[float]:
    return [math.fsum(values) for values in zip(*map(_gains, svds), strict=True)]


def _gains(svd: TruncatedSVD) -> list[float]:
    """σᵢ²/‖G‖²_F; 0 where σᵢ is rounding."""
    sigmas: list[float] = svd.S[: svd.rank].tolist()
    return [(sigma / svd.norm) ** 2 for sigma in sigmas] + [0.0] * (len(svd.S) - svd.rank)
