"""What an adapter's metadata records, as values. docs/format.md specifies them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import ConfigError
from ..ranges import check_range

Kind = Literal["absolute", "scale-free"]
Curve = tuple[tuple[float, float | None], ...]
"""(γ, mean loss after the step), γ ascending; None for a loss that is not finite."""


@dataclass(frozen=True)
class LayerReport:
    """What is known of one layer's gradient and its SVD.

    singular_values: of G, the leading r, descending; r is this layer's.
    rank:            how many of them are more than rounding; the columns of B beyond are zero, the rows of A random.
    gradient_norm:   ‖G‖_F.
    captured_energy: share of ‖G‖²_F in the leading r, 1 for G = 0.
    residual:        ‖G − U·S·Vh‖_F.
    sine:            upper estimate of the sine of the largest principal angle to the true rank-r subspaces; None
                     where they are not defined: (σ_r − σ_{r+1})/σ_r < 0.01.
    init:            "spectral"; "partial" where rank < r; "standard" where G = 0.
    agreement:       of the halves of a sample that was grown (see `sample_size.ComparedLayer`); None where it was not.
    """

    shape: tuple[int, int]
    singular_values: tuple[float, ...]
    rank: int
    gradient_norm: float
    captured_energy: float
    residual: float
    sine: float | None
    svd_method: str
    svd_iterations: int
    init: Literal["spectral", "partial", "standard"]
    agreement: tuple[float, float] | None = None


@dataclass(frozen=True)
class LossReport:
    """Mean loss over all label tokens: of the whole sample, and on some rows before and after the step.

    rows, held_out:  how many rows; whether they are held out of the gradient, else they are some of the sample's.
    after:           None where it is not a finite number: the step is far too long.
    suggested_gamma: where the step raises the loss, a γ that was seen to lower it, and the loss with it.
    curve:           of a γ that was searched for: all that were tried, ascending, with the loss on these rows, None
                     where it is not finite. The lowest is `after`.
    """

    sample: float
    rows: int
    before: float
    after: float | None
    suggested_gamma: float | None = None
    suggested_loss: float | None = None
    held_out: bool = False
    curve: Curve = ()


@dataclass(frozen=True)
class GrowthStage:
    """What one sample of the growth gave.

    samples:          rows; of batches made in Python, batches.
    agreement_median: over the layers that can be compared, of the worse of both sides; None where there are none.
    agreement_min:    likewise.
    captured_energy:  median over the same layers.
    layers_left_out:  those whose gradient has a lower rank than r in one of the halves, or is zero.
    """

    samples: int
    agreement_median: float | None
    agreement_min: float | None
    captured_energy: float | None
    layers_left_out: int


@dataclass(frozen=True)
class GrowthReport:
    """The growth of a sample. available: the rows (or batches) that it could have had; settled: whether it did."""

    tolerance: float
    available: int
    settled: bool
    stages: tuple[GrowthStage, ...]


def check_damping(damping: float, kind: str) -> None:
    """Raise ConfigError for a kind that does not exist or a damping that is no finite number from 0 on."""
    if kind not in get_args(Kind):
        raise ConfigError(f"the preconditioner's kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    check_range("damping", damping)


@dataclass(frozen=True)
class Preconditioner:
    """What a preconditioned trainer should use.

    kind, damping:
        "absolute":   g_A ← (BᵀB + λI)⁻¹·g_A                and g_B ← g_B·(AAᵀ + λI)⁻¹, λ = damping.
        "scale-free": g_A ← (BᵀB/(tr(BᵀB)/r) + δI)⁻¹·g_A    and g_B likewise with AAᵀ,  δ = damping.
    order: both from the factors before the step, applied to the gradients before Adam's moments.

    Raises ConfigError for an unknown kind, or a damping that is negative or not finite.
    """

    kind: Kind
    damping: float
    order: Literal["simultaneous, before the moments"] = "simultaneous, before the moments"

    def __post_init__(self) -> None:
        check_damping(self.damping, self.kind)


DEFAULT_PRECONDITIONER = Preconditioner("scale-free", 0.1)
"""By measurement (benchmarks/damping.py, SmolLM2-135M on GSM8K): at every learning rate tried, the absolute form ended
with a higher held-out loss than plain AdamW, λ = 1e-6 by far; the scale-free one with a slightly lower loss at the best
rate, and one that is 0.005 to 0.04 higher at the others.
"""
