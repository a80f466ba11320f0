"""Which trainings are needed, given those that are done."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import product

from .methods import METHODS
from .presets import ProblemName, Settings
from .runs import Record, Run

MAX_EXTENSIONS = 3
"""Learning rates added beyond an end of the sweep: up to 8 times the highest, or an eighth of the lowest."""


def needed(problem: ProblemName, methods: Sequence[str], settings: Settings, done: Iterable[Record]) -> list[Run]:
    """Runs that can be started now: sweeps with the first seed, then the other seeds at each one's best rate.

    A sweep whose best rate is an end of it is extended by factors of 2. More are needed when these are done.
    """
    records = [record for record in done if record["problem"] == problem]
    present = {key(record) for record in records}
    wanted = []
    for rank in settings.ranks:
        swept = [name for name in methods if METHODS[name].trained]
        for rate, name in product(settings.learning_rates, swept):  # by turns, so that methods do not share a start
            wanted.append(Run(problem, name, rank, rate, settings.seeds[0]))
        for name in swept:
            wanted += _after_sweep(problem, name, rank, settings, records)
        for name, seed in product((name for name in methods if not METHODS[name].trained), settings.seeds):
            wanted.append(Run(problem, name, rank, 0.0, seed))
    return [run for run in wanted if (run.method, run.rank, run.learning_rate, run.seed) not in present]


def key(record: Record) -> tuple[str, int, float, int]:
    return record["method"], record["rank"], record["learning_rate"], record["seed"]


def _after_sweep(
    problem: ProblemName, method: str, rank: int, settings: Settings, records: list[Record]
) -> Iterator[Run]:
    sweep = losses_by_rate(records, method, rank, settings.seeds[0])
    if not set(settings.learning_rates) <= sweep.keys():
        return
    best = best_rate(sweep)
    beyond = {min(sweep): best / 2, max(sweep): best * 2}.get(best)
    extended = [rate for rate in sweep if not min(settings.learning_rates) <= rate <= max(settings.learning_rates)]
    if beyond is not None and len(extended) < MAX_EXTENSIONS:
        yield Run(problem, method, rank, beyond, settings.seeds[0])
        return
    for seed in settings.seeds[1:]:
        yield Run(problem, method, rank, best, seed, curve=True)


def losses_by_rate(records: Iterable[Record], method: str, rank: int, seed: int) -> dict[float, float]:
    """Held-out loss by learning rate, lowest rate first; infinite where the training diverged."""
    found = {
        record["learning_rate"]: math.inf if record["loss"] is None else record["loss"]
        for record in records
        if (record["method"], record["rank"], record["seed"]) == (method, rank, seed)
    }
    return dict(sorted(found.items()))


def at_an_end(sweep: dict[float, float]) -> bool:
    """Whether a rate beyond the sweep might be better than the best."""
    return best_rate(sweep) in (min(sweep), max(sweep))


def best_rate(sweep: dict[float, float]) -> float:
    """The rate with the least loss; the lowest of equals."""
    return min(sweep, key=lambda rate: (sweep[rate], rate))
