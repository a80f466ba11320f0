"""How many rows are enough: the rule by which a sample is doubled until two halves of it agree, and the record of it.

The gradient of each half is that of a sample of half the size. Where the singular subspaces of both gradients agree,
more rows would change little; where they do not, the step takes the directions of the rows that happened to be drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

from ..adapter.records import GrowthStage
from ..errors import ConfigError, DataError
from ..json_files import shown
from ..ranges import RANGES, check_range

DEFAULT_START = 16
DEFAULT_MAX_SAMPLES = 512
DEFAULT_TOLERANCE = 0.4
"""The tolerance was chosen by measurement: see docs/choosing.md."""

ENERGY_SHARE = 0.05
"""The tolerance for the captured energy is this share of the tolerance for the agreement."""


@dataclass(frozen=True)
class Growth:
    """How a sample is grown: `start` rows first, twice as many each time, until it has settled or there are no more.

    tolerance: a sample has settled when, in the median over the layers, its halves agree to 1 − tolerance (see
               `ComparedLayer.agreement`) and the captured energy is within tolerance/20 of what the size before gave.
    start:     the number of rows to start with, at least 2; for batches made in Python, the number of batches.
    """

    tolerance: float = DEFAULT_TOLERANCE
    start: int = DEFAULT_START

    def __post_init__(self) -> None:
        check_range("tolerance", self.tolerance, "the sample's tolerance")
        if not RANGES["start"].holds(self.start):
            raise ConfigError(f"a sample grows from 2 rows at least, got {shown(self.start)}")

    def sizes(self, available: int) -> list[int]:
        """The sizes to try: start, 2·start, 4·start …, and last all that are available.

        Raises DataError for a single row, which has no halves.
        """
        if available < 2:
            raise DataError(
                f"a sample of {available} row has no two halves to compare; give more rows, or `samples=1`"
                " without growth"
            )
        sizes = [min(self.start, available)]
        while sizes[-1] < available:
            sizes.append(min(2 * sizes[-1], available))
        return sizes


class ComparedLayer(Protocol):
    """The report of one layer whose gradient was taken in two halves, as far as it is needed here.

    agreement: mean cos² of the principal angles between the halves' rank-r singular subspaces, of the output side (U)
               and of the input side (V); None where a half's gradient has a numerical rank below r.
    """

    @property
    def agreement(self) -> tuple[float, float] | None: ...

    @property
    def captured_energy(self) -> float: ...


def stage_of(samples: int, layers: Iterable[ComparedLayer]) -> GrowthStage:
    """The layers of a sample summed up, by their median: a layer without a gap after σ_r never agrees."""
    layers = list(layers)
    compared = [layer for layer in layers if layer.agreement is not None]
    values = [min(layer.agreement) for layer in compared if layer.agreement is not None]
    return GrowthStage(
        samples=samples,
        agreement_median=median(values) if values else None,
        agreement_min=min(values, default=None),
        captured_energy=median(layer.captured_energy for layer in compared) if compared else None,
        layers_left_out=len(layers) - len(compared),
    )


def has_settled(stages: Sequence[GrowthStage], tolerance: float) -> bool:
    """Whether the sample has settled at the last of the stages; see `Growth.tolerance`."""
    if len(stages) < 2:
        return False
    before, last = stages[-2:]
    if last.agreement_median is None or before.captured_energy is None or last.captured_energy is None:
        return False
    change = abs(last.captured_energy - before.captured_energy)
    return last.agreement_median >= 1 - tolerance and change <= ENERGY_SHARE * tolerance


def why_unsettled(stages: Sequence[GrowthStage], tolerance: float) -> str:
    """Why `has_settled` says no, in words for the warning."""
    last = stages[-1]
    if last.agreement_median is None or last.captured_energy is None:
        return "no layer of its halves can be compared"
    if last.agreement_median < 1 - tolerance:
        return f"its halves agree to {last.agreement_median:.2f}, {1 - tolerance:g} is wanted"
    if len(stages) < 2 or stages[-2].captured_energy is None:
        return "there is no smaller one to compare it with"
    change = abs(last.captured_energy - stages[-2].captured_energy)
    return f"the captured energy has moved by {change:.3f}, {ENERGY_SHARE * tolerance:g} at most is wanted"
