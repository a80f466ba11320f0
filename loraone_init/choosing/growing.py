"""A sample that grows: ever larger parts of it are taken until one has settled, by the rule of `sample_size`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, Union

from ..adapter.records import GrowthReport, GrowthStage
from ..adapter.wording import describe_stage
from .sample_size import ComparedLayer, Growth, has_settled, stage_of, why_unsettled

if TYPE_CHECKING:
    from ..data.sample import Sample


logger = logging.getLogger(__name__)

SampleOrBatches = Union["Sample", Sequence[Any]]


class Compared(Protocol):
    """What a pass over a sample in two halves gives, as far as it is needed here: a report of each layer."""

    @property
    def layers(self) -> Mapping[str, ComparedLayer]: ...


Result = TypeVar("Result", bound=Compared)


def grow(
    given: SampleOrBatches, growth: Growth | None, take: Callable[[SampleOrBatches], Result]
) -> tuple[SampleOrBatches, Result, GrowthReport | None]:
    """The part of `given` at which it has settled, what `take` makes of that part, and the record of the growth.

    growth: None takes all of `given` at once, and there is no record.
    take:   compares two halves of the sample that it is given. It is called for each size that is tried.

    Logs a warning where even all of `given` has not settled; all of it is then the answer.
    """
    if growth is None:
        return given, take(given), None
    stages: list[GrowthStage] = []
    sizes = growth.sizes(size_of(given))
    for size in sizes:
        sample = first_of(given, size)
        result = take(sample)
        stages.append(stage_of(size_of(sample), result.layers.values()))
        logger.info("%s", describe_stage(stages[-1]))
        settled = has_settled(stages, growth.tolerance)
        if settled:
            break
    if not settled:
        logger.warning(
            "the sample has not settled at %d, all that it may have: %s; let it draw more rows, give more data, or"
            " lower the rank",
            sizes[-1],
            why_unsettled(stages, growth.tolerance),
        )
    return sample, result, GrowthReport(growth.tolerance, sizes[-1], settled, tuple(stages))


def batches_of(given: SampleOrBatches) -> list[Any]:
    """The micro-batches of a sample; a sequence consists of them."""
    return list(getattr(given, "batches", given))  # type: ignore[arg-type]


def size_of(given: SampleOrBatches) -> int:
    """The number of rows of a sample, or of batches in a sequence."""
    return len(getattr(given, "rows", given))  # type: ignore[arg-type]


def first_of(given: SampleOrBatches, size: int) -> SampleOrBatches:
    """The sample of the first `size` rows, in the order drawn; the first batches of a sequence."""
    from ..data.sample import Sample

    return given.first(size) if isinstance(given, Sample) else given[:size]
