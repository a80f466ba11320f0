"""Which γ: a line search on the loss of a step that is 1/γ as long. No torch; `evaluation` measures the losses."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..adapter.records import Curve
from ..config import PUBLISHED_GAMMA

MAX_DOUBLINGS = 10
"""How often γ is doubled in search of a step that lowers the loss, or halved: up to 1024 times as short or long."""

PARTS = 4
"""γ is tried at PUBLISHED_GAMMA·2^(k/PARTS) for whole k, which are rounded to three digits between the doublings. On
this lattice the result does not change with rounding errors of the losses, so that it is the same on several processes,
and it is short enough to be typed."""

USUAL_PASSES = 8
"""Forward passes of the rows that a search takes as a rule: 6 to 10 where the best γ is within a factor of 4 of the
published one. At most it takes 17: one without the step, `MAX_DOUBLINGS` + 2 to find where the loss turns, and four to
come closer."""


class Trials:
    """The losses for those γ that were tried, each of them once. loss_at: mean loss after the step, by γ."""

    def __init__(self, loss_at: Callable[[float], float]) -> None:
        self._loss_at = loss_at
        self._losses: dict[float, float] = {}

    def __call__(self, gamma: float) -> float:
        """Infinite where it is not finite: nothing is worse."""
        if gamma not in self._losses:
            loss = self._loss_at(gamma)
            self._losses[gamma] = loss if math.isfinite(loss) else math.inf
        return self._losses[gamma]

    @property
    def curve(self) -> Curve:
        return tuple((gamma, finite(loss)) for gamma, loss in sorted(self._losses.items()))

    @property
    def best(self) -> float:
        """The γ of the lowest loss, the larger one of two: the shorter step."""
        return min(self._losses, key=lambda gamma: (self._losses[gamma], -gamma))


def finite(loss: float) -> float | None:
    """The loss as it is recorded; None stands for what is not finite, since JSON has no infinity."""
    return loss if math.isfinite(loss) else None


def first_lower(trials: Trials, before: float, gamma: float) -> float | None:
    """The first of γ, 2γ, 4γ, … at which the loss is below `before`; None where `MAX_DOUBLINGS` give none."""
    steps = (gamma * 2**doubling for doubling in range(MAX_DOUBLINGS + 1))
    return next((step for step in steps if trials(step) < before), None)


def find_gamma(trials: Trials, before: float) -> float:
    """The γ of the lowest loss: argmin over γ of L(W − (s/γ)·G_r/σ₁), within a factor of 2^(1/PARTS) of a minimum.

    PUBLISHED_GAMMA is doubled until the step lowers the loss, then doubled or halved while that lowers it further; so
    the loss turns between the neighbours on both sides, and the intervals to them are halved twice, that to the lower
    neighbour first. Where the loss has several minima it is one of them. Nothing that was tried is better, and
    PUBLISHED_GAMMA is among it. Where no γ lowers the loss, it is the one that raises it least.

    before: the loss without a step. For the number of passes see `USUAL_PASSES`.
    """

    def loss(index: int) -> float:
        return trials(_gamma(index))

    if first_lower(trials, before, PUBLISHED_GAMMA) is None:
        return trials.best
    best = next(index for index in range(0, PARTS * MAX_DOUBLINGS + 1, PARTS) if loss(index) < before)
    for direction in (PARTS, -PARTS):
        while abs(best) < PARTS * (MAX_DOUBLINGS - 1) and loss(best + direction) < loss(best):
            best += direction
    width = PARTS
    while width > 1:
        lower_first = sorted((best + width, best - width), key=loss)
        width //= 2
        middles = (best + width if neighbour > best else best - width for neighbour in lower_first)
        best = next((middle for middle in middles if loss(middle) < loss(best)), best)
    return trials.best


def _gamma(index: int) -> float:
    exact: float = PUBLISHED_GAMMA * 2 ** (index / PARTS)
    return exact if index % PARTS == 0 else float(f"{exact:.3g}")
