"""Approximate singular triplets, and what their residuals tell of how accurate they are."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

ROUNDING = 10.0
"""Rounding moves G·v - σ·u and Gᵀ·u - σ·v by up to so many times ε·σ_1 out of the subspace; seen: 9, r to 256."""

ZERO = 10.0
"""Singular values up to so many times ε·‖G‖_F are rounding, not signal."""

MIN_GAP = 0.01
"""Relative gap (σ_r - σ_{r+1})/σ_r below which the rank-r singular subspaces count as undefined."""

MARGIN = 4.0
"""Safety factor on residuals that stand in for unknown errors."""


@dataclass(frozen=True)
class RitzValues:
    """What is known of r approximate singular triplets u_i, s_i, v_i of G with Gᵀ·u_i = s_i·v_i, on the host.

    s, the Ritz values s_i <= σ_i, descending, and e, the residual norms ‖G·v_i - s_i·u_i‖, i = 1..r+1; rounding, that
    of both. Where min(m, n) = r, they end in a 0.
    """

    s: list[float]
    e: list[float]
    rounding: float

    @property
    def r(self) -> int:
        return len(self.e) - 1

    @property
    def gap(self) -> float:
        """(s_r - s_{r+1})/s_r."""
        return 1.0 - self.s[self.r] / self.s[self.r - 1] if self.s[self.r - 1] > 0.0 else 0.0

    def sine(self, eps: float) -> float:
        """Upper estimate of the sine between the spans of U, V, rounded to precision eps, and the true ones.

        Wedin 1972, vector by vector: projected on the true singular vectors beyond r, the residuals show that at most
        e_i/(s_i - σ_{r+1}) of u_i and v_i lies there; so rounding relative to σ_1 is not divided by the gap at σ_r.
        σ_{r+1} is taken as s_{r+1} + e_{r+1}.
        """
        r, following = self.r, self.s[self.r] + self.e[self.r] + 2 * self.rounding
        if self.s[r - 1] <= following:
            return 1.0
        outside = math.hypot(*((self.e[i] + self.rounding) / (self.s[i] - following) for i in range(r)))
        return min(1.0, outside + MARGIN * eps * math.sqrt(r))

    def defined_sine(self, rank: int, eps: float) -> float | None:
        """The sine, where G has the numerical rank r at least and a gap after it."""
        return self.sine(eps) if rank == self.r and self.gap >= MIN_GAP else None

    def first(self, r: int) -> RitzValues:
        """The values of the first r triplets."""
        return RitzValues(self.s[: r + 1], self.e[: r + 1], self.rounding)


@dataclass(frozen=True)
class Triplets(RitzValues):
    """The triplets themselves: U (m, r), Vh (r, n). s holds all q > r Ritz values."""

    U: Tensor
    Vh: Tensor

    def excess(self) -> float:
        """About Σ σ_i² - Σ s_i², i <= r: how far ‖G - USVh‖²_F lies above its minimum.

        V captures ‖G·V‖² = Σ s_i² + Σ e_i², so Σ e_i² is what the next half step gains at least; each one after that
        gains less by a factor (σ_{q+1}/σ_r)². s_q stands for σ_{q+1} here.
        """
        decay = (self.s[-1] / self.s[self.r - 1]) ** 2 if self.s[self.r - 1] > 0.0 else 0.0
        return math.hypot(*self.e[: self.r]) ** 2 / max(1.0 - decay, 1e-3)
