"""The search for a learning rate: short trainings from the same start, compared on rows that they do not see."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import IntervalStrategy

from ..data.sample import Sample
from ..errors import ConfigError, NumericalError
from .options import TrainOptions

logger = logging.getLogger(__name__)

STEPS = 20
"""Of each trial, or as many as the training has."""
FIRST_RATE = 1e-3
"""Half of what was best in most of the benchmarks (docs/results.md), so that the first doubling tries that."""
MAX_DOUBLINGS = 6
"""How often the first rate is doubled, or halved: up to 64 times as high or low."""
HELD_OUT = 16

Tried = list[tuple[float, float]]
"""(learning rate, loss), in the order tried; infinity for a loss that is not finite."""

MakeTrainer = Callable[[Sample, Sample, Path, TrainOptions], Trainer]


def choose_rate(make: MakeTrainer, model: nn.Module, data: Sample, options: TrainOptions) -> float:
    """The rate with the lowest loss on rows of `data` that a trial does not see; each that is tried is told.

    make: a trainer of the model from (rows to train on, rows to evaluate, a directory, options).

    Raises ConfigError where there are too few rows, NumericalError where no loss is finite.
    """
    steps = min(STEPS, options.max_steps or STEPS)
    trained, held_out = _divide(data)
    logger.info(
        "Trying learning rates for %d steps each, from the same start; losses are on %d rows that these do not see",
        steps,
        len(held_out.rows),
    )

    def loss_at(rate: float) -> float:
        trial = replace(options, learning_rate=rate, max_steps=steps, report_to="none")
        with _from_the_start(model), TemporaryDirectory() as place:
            trainer = make(trained, held_out, Path(place), trial)
            trainer.args.save_strategy = trainer.args.logging_strategy = IntervalStrategy.NO
            trainer.train()
            loss = float(trainer.evaluate()["eval_loss"])
        loss = loss if math.isfinite(loss) else math.inf
        logger.info("learning rate %.1e: loss %.4f", rate, loss)
        return loss

    tried = search_rate(loss_at)
    best = best_rate(tried)
    logger.info("Going on with %.1e, from the start; the search took %d steps", best, steps * len(tried))
    return best


def search_rate(loss_at: Callable[[float], float]) -> Tried:
    """What was tried: FIRST_RATE, doubled for as long as the loss falls; if it rose at once, halved likewise.

    Raises NumericalError where no loss is finite.
    """
    tried = [(FIRST_RATE, loss_at(FIRST_RATE))]
    for factor in (2.0, 0.5):
        rate, lowest = tried[0]
        for _ in range(MAX_DOUBLINGS):
            rate *= factor
            loss = loss_at(rate)
            tried.append((rate, loss))
            is_overflow = math.isinf(loss) and factor < 1  # it may end with a lower rate
            if loss >= lowest and not is_overflow:
                break
            lowest = loss
        if best_rate(tried) > FIRST_RATE:
            break
    if all(math.isinf(loss) for _, loss in tried):
        raise NumericalError(
            f"no learning rate from {tried[-1][0]:g} on ends at a finite loss; look at the start's loss, or use fp32"
        )
    return tried


def best_rate(tried: Tried) -> float:
    """That with the lowest loss, of equal ones the lower."""
    return min(tried, key=lambda one: (one[1], one[0]))[0]


def _divide(data: Sample) -> tuple[Sample, Sample]:
    """Rows for the trials' steps, and rows for their losses: a quarter of all, HELD_OUT at most."""
    count = min(HELD_OUT, len(data.rows) // 4)
    if count == 0:
        raise ConfigError(
            f'learning_rate "auto" needs 4 rows at least, to hold one out; {data.source} has {len(data.rows)}'
        )
    return replace(data, rows=data.rows[:-count]), replace(data, rows=data.rows[-count:])


@contextmanager
def _from_the_start(model: nn.Module) -> Iterator[None]:
    """What is trained inside is as it was, afterwards, and nothing of a trial is left in memory."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(trained, before, strict=True):
                parameter.copy_(value)
                parameter.grad = None
        gc.collect()
