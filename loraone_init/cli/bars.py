"""Progress on standard error: what a run waits for, one bar for all of its work, and what its search for γ finds."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from ..monitor import Monitor, Stage
from .waiting import LIBRARIES, OPENING, READING, Waiting

if TYPE_CHECKING:
    from ..choosing.sample_size import Growth
    from ..config import Auto
    from ..data.sample import Sample

FORWARD, BACKWARD, EVALUATION = 1.0, 3.0, 1.0
"""What a row costs in each stage, against its forward. The backward computes each block again, then the gradients of
its inputs and weights, and the SVDs: 2.8 times the forward with the demo model on a CPU."""


_WAITING: dict[Stage, str] = {"import": LIBRARIES, "open": OPENING, "data": READING}


class Work:
    """How much of a run is done, of how much, in forward passes of a row.

    samples:   rows of each sample that gradients may be taken of; the last ones are left out where one before them is
               enough, so that the total shrinks.
    evaluated: rows that go through the model after that, in all passes.
    """

    def __init__(self, samples: Sequence[int], evaluated: float) -> None:
        self._samples = samples
        self._evaluated = EVALUATION * evaluated
        self._sample = 0
        self._shares: dict[Stage, float] = {}

    def step(self, stage: Stage, share: float) -> None:
        """A share of a stage is over. The forward of the next sample follows the whole backward of the one before."""
        if stage == "forward" and self._shares.get("backward") == 1:
            self._sample, self._shares = min(self._sample + 1, len(self._samples) - 1), {}
        self._shares[stage] = share

    @property
    def done(self) -> float:
        """Falls where a pass begins anew with smaller micro-batches."""
        forward, backward, evaluated = (self._shares.get(stage, 0.0) for stage in ("forward", "backward", "evaluate"))
        row = FORWARD * forward + BACKWARD * backward
        return self._gradients(self._sample) + row * self._samples[self._sample] + evaluated * self._evaluated

    @property
    def total(self) -> float:
        samples = self._sample + 1 if "evaluate" in self._shares else len(self._samples)
        return self._gradients(samples) + self._evaluated

    def _gradients(self, samples: int) -> float:
        """Of so many whole samples."""
        return (FORWARD + BACKWARD) * sum(self._samples[:samples])


class Bars(Monitor):
    """What is waited for, then one bar with the time left, where standard error is a terminal; and a line for each γ
    that is searched.
    """

    def __init__(self, shown: bool = True) -> None:
        super().__init__()
        self._shown = shown
        self._bar = Progress(
            TextColumn("{task.description:>8}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=Console(stderr=True),
            transient=True,
            disable=not (shown and sys.stderr.isatty()),
            speed_estimate_period=3600,  # the weights of the stages make up for their speeds
        )
        self._waiting = Waiting(shown)
        self._work: Work | None = None

    def __enter__(self) -> Bars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Take away what is shown."""
        self._waiting.stop()
        self._bar.stop()

    @contextmanager
    def timed(self, stage: Stage) -> Iterator[None]:
        if stage in _WAITING:
            self._waiting.say(_WAITING[stage])
        with super().timed(stage):
            yield

    def expect(self, sample: Sample, gamma: float | Auto, growth: Growth | None) -> None:
        """Tell what is to come, before the first step."""
        from ..initialization.evaluation import expected_passes, num_evaluated

        rows, held_out = len(sample.rows), len(sample.held_out)
        self._waiting.stop()
        self._bar.start()
        evaluated = (held_out or num_evaluated(rows)) * expected_passes(gamma, bool(held_out))
        self._work = Work([rows] if growth is None else growth.sizes(rows), evaluated)
        self._task = self._bar.add_task("", total=self._work.total)

    def step(self, stage: Stage, done: int, total: int) -> None:
        if self._work is not None:
            self._work.step(stage, done / total)
            self._bar.update(self._task, description=stage, completed=self._work.done, total=self._work.total)

    def tried(self, gamma: float, loss: float) -> None:
        if self._shown:
            self._bar.console.print(Text(f"γ {gamma:g}: loss {loss:.4f}"))
