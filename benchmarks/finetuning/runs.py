"""One training, from its start to the record of what came of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, count, islice
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

from loraone_init import PreconditionedAdamW
from loraone_init.data.batches import Batch, collate
from loraone_init.data.sample import Sample
from loraone_init.errors import NumericalError

from .methods import METHODS
from .presets import ProblemName, Settings
from .problems import Losses, Problem
from .starts import Workshop, prepare

MAX_GRAD_NORM = 1.0
WARM_UP = 0.1  # of the steps

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What tells one training from all others. curve: whether it is evaluated on its way."""

    problem: ProblemName
    method: str
    rank: int
    learning_rate: float
    seed: int
    curve: bool = False


def train(run: Run, problem: Problem, workshop: Workshop) -> Record:
    """The record of `run`: AdamW with a cosine schedule, the same rows in the same order for all methods of a seed.

    Held-out losses are means over label tokens (rows of a classification), None where not finite; a training that
    diverges ends there.
    """
    method, settings, device = METHODS[run.method], workshop.settings, workshop.device
    prepared = prepare(problem, method, run.rank, run.seed, workshop)
    model = prepared.model.to(device)
    evaluation = problem.sample("held-out", settings.eval_rows, 0)
    num_steps = settings.steps if method.trained else 0
    points = {num_steps} | ({0, *settings.curve} if run.curve else set())
    curve = [_evaluate(0, problem, model, evaluation, device)] if 0 in points else []
    losses: list[float] = []
    start, evaluating = workshop.seconds(), 0.0
    for step, loss in enumerate(_steps(run, problem, model, num_steps, settings.batch_size, device), 1):
        losses.append(round(loss, 5))
        if step in points:
            before = workshop.seconds()
            curve.append(_evaluate(step, problem, model, evaluation, device))
            evaluating += workshop.seconds() - before
    diverged = len(losses) < num_steps or not all(map(math.isfinite, losses))
    return {
        **asdict(run),
        "loss": None if diverged else curve[-1]["loss"],
        "accuracy": None if diverged else curve[-1]["accuracy"],
        "evaluations": curve,
        "training_losses": [loss for loss in losses if math.isfinite(loss)],
        "gamma": prepared.gamma,
        "init_seconds": round(prepared.seconds, 2),
        "train_seconds": round(workshop.seconds() - start - evaluating, 2),
        "how": how(settings),
    }


def how(settings: Settings) -> Record:
    """What has to be the same for runs to be compared; not which of them there are."""
    which = ("curve", "ranks", "learning_rates", "seeds")
    return {name: value for name, value in asdict(settings).items() if name not in which}


def _steps(
    run: Run, problem: Problem, model: PeftModel, num_steps: int, batch_size: int, device: torch.device
) -> Iterator[float]:
    """Takes the steps and gives each one's training loss; the last is not finite where the training diverges."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _optimizer(run, model, parameters)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(WARM_UP * num_steps), num_steps)
    torch.manual_seed(run.seed)  # of dropout
    for batch in _batches(problem, run.seed, num_steps, batch_size):
        model.train()
        found = problem.losses(model, _moved(batch, device))
        loss = found.total / found.count
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        try:
            optimizer.step()
        except NumericalError:  # a factor is not finite any more
            loss = loss.new_tensor(math.nan)
        schedule.step()
        optimizer.zero_grad()
        yield loss.item()
        if not math.isfinite(loss.item()):
            return


def _optimizer(run: Run, model: PeftModel, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if METHODS[run.method].preconditioned:
        return PreconditionedAdamW(parameters, model, lr=run.learning_rate, weight_decay=0.0)
    return torch.optim.AdamW(parameters, lr=run.learning_rate, weight_decay=0.0)


def _batches(problem: Problem, seed: int, num_batches: int, batch_size: int) -> Iterator[Batch]:
    """In an order that depends on the seed only; all rows once before any comes again."""
    if not num_batches:
        return
    sample = problem.sample("train", num_batches * batch_size, 1000 + seed)
    loader = DataLoader(
        sample.rows,  # type: ignore[arg-type]
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(seed),
        collate_fn=partial(collate, pad_id=sample.pad_id),
    )
    epochs = chain.from_iterable(loader for _ in count())
    yield from islice(epochs, num_batches)


@torch.no_grad()
def _evaluate(step: int, problem: Problem, model: PeftModel, sample: Sample, device: torch.device) -> Record:
    model.eval()
    found: list[Losses] = [problem.losses(model, _moved(batch, device)) for batch in sample.batches]
    num_terms = sum(losses.count for losses in found)
    loss = sum(losses.total.item() for losses in found) / num_terms
    right = sum(losses.right for losses in found) / num_terms
    return {"step": step, "loss": round(loss, 5) if math.isfinite(loss) else None, "accuracy": round(right, 5)}


def _moved(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}
