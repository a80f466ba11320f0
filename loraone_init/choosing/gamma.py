"""Which γ: a line search on the loss of a step that is 1/γ as long. No torch; `evaluation` measures the losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..adapter.records import Curve
from ..config import PUBLISHED_GAMMA

PARTS = 4
"""γ is tried at PUBLISHED_GAMMA·2^(k/PARTS) for whole k, its places, rounded to three digits between the doublings. On
this lattice the result does not change with rounding errors of the losses, so that it is the same on several processes,
and it is short enough to be typed."""

USUAL_PASSES = 4
"""Forward passes of the rows that a search takes as a rule: one without a step, and three with one. So it was on 17 of
21 measured curves (benchmarks/gamma_curves.py), with 5 or 6 on the others, where the gradient says little of the rows.
Where the slope is misleading or the best γ far from the first it takes up to `MAX_TRIALS` + 1."""

MAX_TRIALS = 11
"""Steps of other lengths whose loss is measured, at most."""

MAX_DOUBLINGS = 10
"""How often a γ that was given is doubled in search of one that lowers the loss: up to 1024 times as short a step."""

_LONGEST = 1 / 8  # s/γ of the first trial, at most: about the longest that was seen to be good
_KEPT = 0.5  # share of the slope on the gradient's own rows that was seen to be left on others: 0.3 to 1
_POWER = 0.85  # a loss falls as α·t^p − β·t^2p with this p: seen to be flatter beyond the best length t than a parabola
_POWERS = [k / 20 for k in range(8, 61)]  # of the curve through three steps
_FAR = 3 * PARTS  # places that one trial may be from the last: 8 times as short a step, or as long
_WORTH = 0.005  # share of the fall that has to be expected of a further trial
_PROPORTIONAL = 0.6  # within this factor a rise of the loss counts as in proportion to the step's length
_NOTHING = 0.001  # share of the loss that counts as very small
_LAST_PLACE = 32 * PARTS  # 128·2^32 is below the largest γ that is allowed


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


def find_gamma(trials: Trials, before: float, slope: float, scale: float) -> float:
    """The γ of the lowest loss: argmin over γ of L(W − (s/γ)·G_r/σ₁), within a factor of 2^(1/PARTS) of a minimum.

    The first step is as long as would take the whole loss away if it went on falling with its slope, or s/γ = 1/8 where
    that is shorter. The second is at the minimum of the parabola through the loss before, its slope and the loss of the
    first; each further one at the minimum of a curve through the best step so far and its neighbours. The search is
    over where that minimum has been tried, or is hardly lower than the best step and between two that were tried.
    Nothing that was tried is better than the result. Where no γ lowers the loss, it is the one that raises it least of
    those tried.

    before: the loss without a step.
    slope:  of the loss against 1/γ where the step is short: the loss is before − slope/γ, to first order. On rows of
            the gradient that is known from it; on others it is taken to be half of that.
    scale:  s.

    For the number of passes see `USUAL_PASSES`.
    """
    place: int | None = _first_place(before, slope, scale)
    tried = _Tried()
    while place is not None:
        tried.falls[place] = before - trials(_gamma(place))
        place = _next_place(tried, before, slope) if slope > 0 and len(tried.falls) < MAX_TRIALS else None
    return trials.best


def _gamma(place: int) -> float:
    exact: float = PUBLISHED_GAMMA * 2 ** (place / PARTS)
    return float(f"{exact:.6g}" if place % PARTS == 0 else f"{exact:.3g}")


def _place(length: float, power: float = 1.0) -> float:
    """Of the γ that is length^(−1/power), between the places of the lattice."""
    if not 0 < length < math.inf:
        return math.inf if length == 0 else -math.inf
    return -PARTS * (math.log2(PUBLISHED_GAMMA) + math.log2(length) / power)


def _first_place(before: float, slope: float, scale: float) -> int:
    longest = _LONGEST / scale
    length = min(longest, before / slope) if before > 0 and slope > 0 else longest
    return round(max(-_LAST_PLACE, min(_place(length), _LAST_PLACE)))


@dataclass(frozen=True)
class _Tried:
    """What is known of the loss. falls: by how much it falls, by place; −∞ where the step's loss is not finite."""

    falls: dict[int, float] = field(default_factory=dict)

    @property
    def best(self) -> int:
        return max(self.falls, key=lambda place: (self.falls[place], place))

    @property
    def longer(self) -> int | None:
        """The next longer step than the best one."""
        return max((place for place in self.falls if place < self.best), default=None)

    @property
    def shorter(self) -> int | None:
        return min((place for place in self.falls if place > self.best), default=None)


def _next_place(tried: _Tried, before: float, slope: float) -> int | None:
    """The place to be tried next; None where the search is over."""
    best, longer, shorter = tried.best, tried.longer, tried.shorter
    if _is_hopeless(tried, before):
        return None
    where, expected = _best_by_curve(tried, slope)
    least = max(-_LAST_PLACE, best - _FAR, -_LAST_PLACE if longer is None else longer + 1)
    most = min(_LAST_PLACE, best + _FAR, _LAST_PLACE if shorter is None else shorter - 1)
    place = round(max(least, min(where, most)))
    is_between = longer is not None and shorter is not None
    if place != best:
        return None if is_between and expected - tried.falls[best] < _WORTH * tried.falls[best] else place
    if 1 + len(tried.falls) < USUAL_PASSES:  # the curve is through few points: rather the side where none are
        place += 1 if longer is not None or (shorter is None and where > best) else -1
    elif longer is not None and best - longer > 2 * PARTS:  # or where little is known
        place -= PARTS
    return place if least <= place <= most and place != best else None


def _is_hopeless(tried: _Tried, before: float) -> bool:
    """Whether a step raises the loss however short it is: the rise is in proportion to its length, and very small."""
    rise = -tried.falls[tried.best]
    if tried.longer is None or rise < 0 or rise > _NOTHING * abs(before):
        return False
    in_proportion = rise * 2 ** ((tried.best - tried.longer) / PARTS)
    return _PROPORTIONAL * in_proportion <= -tried.falls[tried.longer] <= in_proportion / _PROPORTIONAL


def _best_by_curve(tried: _Tried, slope: float) -> tuple[float, float]:
    """(where the loss is lowest, between places; how much it falls there), by a curve through what was measured."""
    falls, best = tried.falls, tried.best
    longer, shorter = tried.longer, tried.shorter
    known = sorted((place for place, fall in falls.items() if math.isfinite(fall)), key=lambda place: abs(place - best))
    if not known:
        return math.inf, math.inf
    if len(known) == 1:
        return _by_slope(best, falls[best], slope * _KEPT), math.inf
    if longer in known and shorter is not None:
        return _by_three(falls, longer, best, shorter)
    return _by_two(falls, best, known[1])


def _by_slope(place: int, fall: float, slope: float) -> float:
    """Of the parabola slope·t − c·t² through the fall of one step, t = 1/γ."""
    length = 1 / _gamma(place)
    excess = slope * length - fall
    return _place(slope * length**2 / (2 * excess)) if excess > 0 else -math.inf


def _by_two(falls: Mapping[int, float], first: int, second: int, power: float = _POWER) -> tuple[float, float]:
    """Of the curve α·u − β·u², u = t^power, through the falls of two steps."""
    u, v = (math.pow(_gamma(place), -power) for place in (first, second))
    steepness, other = falls[first] / u, falls[second] / v
    beta = (steepness - other) / (v - u)
    alpha = steepness + beta * u
    if not alpha > 0:  # shorter steps raise the loss as well, as far as the curve tells
        return math.inf, math.inf
    if not beta > 0:
        return -math.inf, math.inf
    return _place(alpha / (2 * beta), power), alpha * alpha / (4 * beta)


def _by_three(falls: Mapping[int, float], longer: int, best: int, shorter: int) -> tuple[float, float]:
    """Likewise of the curve of any power that is through the best step and closest to its neighbours on both sides."""
    near, far = sorted((longer, shorter), key=lambda place: abs(place - best))

    def miss(power: float) -> float:
        """By how much the curve through the nearer two misses the third."""
        u, v, w = (math.pow(_gamma(place), -power) for place in (best, near, far))
        beta = (falls[best] / u - falls[near] / v) / (v - u)
        missed = falls[best] / u + beta * (u - w) - falls[far] / w
        return abs(missed) * w

    return _by_two(falls, best, near, min(_POWERS, key=miss))
