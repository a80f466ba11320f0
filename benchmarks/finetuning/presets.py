"""How long is trained and how much is measured, by preset and problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ProblemName = Literal["gsm8k", "newsgroups"]


@dataclass(frozen=True)
class Settings:
    """Of one problem.

    max_length:     tokens kept of a row, in training, evaluation and initialisation.
    eval_rows:      held-out rows that are evaluated, the same for all.
    curve:          steps after which runs at the best learning rate are evaluated, beside the last.
    init_rows:      rows of the gradient, for every method that takes one.
    search_rows:    rows held out from it, for γ = auto.
    learning_rates: swept with the first seed; more are added beyond an end that turns out best.
    """

    steps: int
    batch_size: int
    max_length: int
    eval_rows: int
    curve: tuple[int, ...]
    init_rows: int
    search_rows: int
    ranks: tuple[int, ...]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...] = (0, 1, 2)


RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)

PRESETS: dict[str, dict[ProblemName, Settings]] = {
    "cpu": {
        "gsm8k": Settings(20, 4, 128, 24, (5, 10, 15), 32, 16, (8,), RATES),
        "newsgroups": Settings(30, 16, 48, 128, (8, 15, 22), 64, 64, (8, 32), RATES),
    },
    "gpu": {
        "gsm8k": Settings(870, 16, 512, 473, (100, 200, 400, 600), 64, 64, (8, 32), RATES),
        "newsgroups": Settings(1400, 16, 256, 2000, (100, 200, 400, 800), 64, 64, (8, 32), RATES),
    },
    "quick": {
        "gsm8k": Settings(2, 2, 48, 2, (1,), 2, 2, (4,), (1e-3, 2e-3, 4e-3), (0, 1)),
        "newsgroups": Settings(2, 2, 16, 4, (1,), 2, 2, (4,), (1e-3, 2e-3, 4e-3), (0, 1)),
    },
}
