"""One number of ranks for all layers, given to each by the spectrum of its gradient.

PEFT takes a rank for each layer (`rank_pattern`), and α with it (`alpha_pattern`). s, and with it the length of the
step, is the same in all layers: that of the average rank.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Literal, get_args

from .errors import ConfigError
from .expert_layout import expert_names

if TYPE_CHECKING:
    from .expert_layout import ExpertStack
    from .svd import TruncatedSVD

Counted = Literal["average", "total"]

MAX_TIMES = 4
"""No layer gets more than so many times the average: it is what SVDs compute and host memory holds of every layer."""


@dataclass(frozen=True)
class RankBudget:
    """ranks: the average over all layers, or their sum. The matrix of each expert counts as a layer.

    Every layer gets 1 at least, MAX_TIMES · average or what its shape allows at most. Raises ConfigError.
    """

    ranks: int
    counted: Counted = "average"

    def __post_init__(self) -> None:
        if not isinstance(self.ranks, int) or isinstance(self.ranks, bool) or self.ranks < 1:
            raise ConfigError(f"a rank budget is a whole number of at least 1, got {self.ranks!r}")
        if self.counted not in get_args(Counted):
            raise ConfigError(f"a rank budget is counted as {' or '.join(get_args(Counted))}, got {self.counted!r}")

    def total(self, num_layers: int) -> int:
        """The sum of all ranks."""
        return self.ranks * num_layers if self.counted == "average" else self.ranks

    def average(self, num_layers: int) -> int:
        """Rounded; at least 1."""
        return max(1, round(self.total(num_layers) / num_layers))

    def limits(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
        """The largest rank that each layer may get, from the shapes (out, in).

        Raises ConfigError where the budget gives a layer less than 1, or more than all of them may get.
        """
        total, most = self.total(len(shapes)), MAX_TIMES * self.average(len(shapes))
        limits = {name: min(most, *shape) for name, shape in shapes.items()}
        if total < len(limits):
            raise ConfigError(
                f"{total} ranks are too few for {len(limits)} layers, which get 1 at least; use --rank-budget 1 or"
                f" total:{len(limits)}, or adapt fewer layers with --target-modules"
            )
        if total > sum(limits.values()):
            raise ConfigError(
                f"{total} ranks are more than the {len(limits)} layers may get by their shapes, and {MAX_TIMES} times"
                f" the average each, {sum(limits.values())}; use a smaller --rank-budget"
            )
        return limits


def parse_rank_budget(text: str) -> RankBudget:
    """ "8" is the average, "total:1680" the sum. Raises ConfigError."""
    counted: Counted = "total" if text.startswith("total:") else "average"
    number = text.removeprefix("total:")
    if not (number.isascii() and number.isdecimal()):
        raise ConfigError(f"--rank-budget is an average rank such as 8, or a sum such as total:1680; got {text!r}")
    return RankBudget(int(number), counted)


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


def describe_ranks(ranks: Sequence[int]) -> str:
    """8; or 1 to 32 (median 6)."""
    least, most = min(ranks), max(ranks)
    return str(least) if least == most else f"{least} to {most} (median {median(ranks):g})"


def _sum_of_gains(svds: Sequence[TruncatedSVD]) -> list[float]:
    return [math.fsum(values) for values in zip(*map(_gains, svds), strict=True)]


def _gains(svd: TruncatedSVD) -> list[float]:
    """σᵢ²/‖G‖²_F; 0 where σᵢ is rounding."""
    sigmas: list[float] = svd.S[: svd.rank].tolist()
    return [(sigma / svd.norm) ** 2 for sigma in sigmas] + [0.0] * (len(svd.S) - svd.rank)
