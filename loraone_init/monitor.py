"""What a run tells while it works: seconds by stage, and steps done."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Stage = Literal["import", "open", "data", "forward", "head", "backward", "svd", "evaluate", "save"]


class Monitor:
    """Keeps the seconds of each stage, a stage inside another counted for itself only, and the schedule.

    Override `step` and `tried` to show them.
    """

    def __init__(self) -> None:
        self.seconds: dict[Stage, float] = defaultdict(float)
        self.schedule: tuple[str, str] | None = None
        self._running: list[Stage] = []
        self._since = time.perf_counter()

    @contextmanager
    def timed(self, stage: Stage) -> Iterator[None]:
        """The time inside belongs to `stage`."""
        self._charge()
        self._running.append(stage)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def scheduled(self, schedule: str, why: str) -> None:
        """Gradients are taken by this schedule from now on."""
        self.schedule = schedule, why

    def step(self, stage: Stage, done: int, total: int) -> None:
        """`done` of `total` steps of a stage are over."""

    def tried(self, gamma: float, loss: float) -> None:
        """The search for γ has measured the mean loss after the step with this one."""

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now
