"""The loss before and after the step, on rows held out of the gradient, or else on some of the rows it is from."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ..adapter.records import LayerReport, LossReport
from ..choosing.gamma import USUAL_PASSES, Trials, find_gamma, finite, first_lower
from ..config import AUTO, Auto, InitConfig
from ..data.pieces import Piece, cut_rows, whole_batches
from ..errors import DataError, NumericalError
from ..gradients.losses import RowLosses, check_losses, sum_losses
from ..gradients.objective import Objective
from ..gradients.stream import stream_losses
from ..linalg.factors import LoraPair
from ..monitor import Monitor
from ..processes.processes import Processes
from ..streaming.stack import BlockStack
from .passes import PassResult

logger = logging.getLogger(__name__)


SHORTER_FOR_OTHERS = 2
"""On rows of the gradient itself longer steps look good than on others: the best ones were seen to be 1.0 to 2.4 times
as long. So γ is this many times the best one there, where no others are held out."""

OWN_ROWS = (
    "No rows are held out of the gradient, so γ was searched on some of its own (%d). Longer steps look good there than"
    " on other rows: %g was the best, and %d times that is taken. Rows to hold out would tell more"
)
"""What is told of such a search."""


def num_evaluated(num_rows: int) -> int:
    """How many rows of the sample are evaluated: a quarter of them up to eight rows, then an eighth; at least one."""
    return max(1, min(num_rows // 4, max(8, num_rows // 8)))


@contextmanager
def applied(
    pairs: Mapping[str, LoraPair],
    targets: Mapping[str, nn.Module],
    scale: float | Mapping[str, float],
    gamma: float = 1.0,
) -> Iterator[None]:
    """Inside, each target layer answers y + scale/gamma·B·(A·x): the adapter without changing a weight.

    scale: of all layers, or of each.
    gamma: for pairs for γ = 1: both factors are multiplied by γ^(−1/2), as the adapter's will be.
    """
    with ExitStack() as stack:
        for name, pair in pairs.items():
            own = scale[name] if isinstance(scale, Mapping) else scale
            hook = targets[name].register_forward_hook(partial(_add_update, pair, own, gamma), with_kwargs=True)
            stack.callback(hook.remove)
        yield


def _add_update(
    pair: LoraPair,
    scale: float,
    gamma: float,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: torch.Tensor,
) -> torch.Tensor:
    x = args[0] if args else next(iter(kwargs.values()))
    A, B = ((factor * gamma**-0.5).to(x) for factor in (pair.A, pair.B))
    updated: torch.Tensor = output + scale * (x @ A.T @ B.T)
    return updated


class LossEvaluator:
    """Mean losses by plain forward passes through the blocks, shared by all processes, which all get the same mean.

    expected: the number of passes that the progress bar counts on.
    """

    def __init__(
        self, stack: BlockStack, objective: Objective, monitor: Monitor, processes: Processes, expected: int = 1
    ) -> None:
        self.by_row = objective.by_row
        self._stack = stack
        self._objective = objective
        self._monitor = monitor
        self._processes = processes
        self._expected = expected
        self._done = 0

    def mean_loss(self, batches: Sequence[Any]) -> tuple[float, int]:
        """(mean over all terms, number of rows that have any); the mean of none is not a number."""
        losses = stream_losses(self._stack, self._objective, batches, self._on_step, self._processes)
        self._done += 1
        own = (*sum_losses(losses), sum(int((rows.counts > 0).sum()) for rows in losses))
        totals, counts, num_rows = map(sum, zip(*self._processes.gather(own), strict=True))
        return totals / counts if counts else math.nan, int(num_rows)

    def tell(self, gamma: float, loss: float) -> None:
        """Have the monitor know what a search for γ has found."""
        self._monitor.tried(gamma, loss)

    def _on_step(self, done: int, total: int) -> None:
        self._monitor.step("evaluate", self._done * total + done, max(self._expected, self._done + 1) * total)


def expected_passes(gamma: float | Auto, held_out: bool) -> int:
    """How many forward passes `evaluate_step` usually takes."""
    if gamma == AUTO:
        return USUAL_PASSES  # of the gradient's own rows the loss is known, but a shorter step is tried last
    return 2 if held_out else 1


def evaluate_step(
    evaluator: LossEvaluator,
    batches: Sequence[Any],
    held_out: Sequence[Any],
    found: PassResult,
    targets: Mapping[str, nn.Module],
    config: InitConfig,
    scales: Mapping[str, float],
) -> tuple[float, LossReport]:
    """γ, and the mean losses of W and of W + (s/γ)·B·A: on the batches held out if there are any, else on some rows.

    batches, found: what the gradient was taken from, and what the pass over it gave.
    scales: s of each layer.

    γ is config.gamma; where the step then raises the loss, it is doubled until one is found that lowers it, which is
    suggested. For "auto" it is the one with the lowest loss (`choosing.find_gamma`). Where nothing is held out, that is
    searched on rows of the gradient, and twice as large, which is told.

    Raises DataError where no token of rows held out is trained on, NumericalError where their loss is not finite.
    """
    sample, _ = check_losses(found.losses)
    if held_out:
        rows, (before, num_rows) = held_out, _checked(evaluator.mean_loss(held_out))
    else:
        rows, known = some_rows(whole_batches(batches, evaluator.by_row), found.losses, config.seed)
        (before, _), num_rows = check_losses(known), sum(len(part.sums) for part in known)

    def loss_at(gamma: float) -> float:
        with applied(found.pairs, targets, scales, gamma):
            loss, _ = evaluator.mean_loss(rows)
        if gamma != config.gamma:  # one that was given is no find of a search
            evaluator.tell(gamma, loss)
        return loss

    trials = Trials(loss_at)
    suggested = None
    if config.gamma == AUTO:
        gamma = find_gamma(trials, before, first_order_fall(found.layers, scales), config.scale)
        if not held_out:
            logger.warning(OWN_ROWS, num_rows, gamma, SHORTER_FOR_OTHERS)
            gamma *= SHORTER_FOR_OTHERS
    else:
        gamma = float(config.gamma)
        suggested = None if trials(gamma) <= before else first_lower(trials, before, gamma)
    report = LossReport(
        sample=sample,
        rows=num_rows,
        before=before,
        after=finite(trials(gamma)),
        suggested_gamma=suggested,
        suggested_loss=None if suggested is None else trials(suggested),
        held_out=bool(held_out),
        curve=trials.curve if config.gamma == AUTO else (),
    )
    return gamma, report


def first_order_fall(layers: Mapping[str, LayerReport], scales: Mapping[str, float]) -> float:
    """Σ s·(σ₁² + … + σ_r²)/σ₁ over all layers: what a short step takes off the loss of the gradient's rows, times γ.

    In each layer it is the product of G with the step (s/γ)·U·Ŝ·Vᵀ, Ŝ = S/σ₁. scales: s of each layer.
    """
    spectra = {name: report.singular_values for name, report in layers.items()}
    return sum(scales[name] * sum(value**2 for value in S) / S[0] for name, S in spectra.items() if S[0] > 0)


def _checked(loss: tuple[float, int]) -> tuple[float, int]:
    """The (mean loss, number of rows) of the rows held out, without the step, if there are any and it is finite."""
    before, num_rows = loss
    if num_rows == 0:
        raise DataError("the rows held out have no trainable tokens: every label is masked; hold out others")
    if not math.isfinite(before):
        raise NumericalError(f'the loss of the rows held out is {before}; check them; `dtype="float32"` may help')
    return before, num_rows


def some_rows(pieces: Sequence[Piece], losses: Sequence[RowLosses], seed: int) -> tuple[list[Any], list[RowLosses]]:
    """Some rows of the batches, and their losses. A batch that cannot be divided is taken whole or not at all.

    losses: the losses of each of the pieces, which are whole batches.
    """
    units = [
        (index, row)
        for index, (piece, known) in enumerate(zip(pieces, losses, strict=True))
        for row in _rows_with_terms(piece, known)
    ]
    order = torch.randperm(len(units), generator=torch.Generator().manual_seed(seed)).tolist()
    taken = sorted(units[i] for i in order[: num_evaluated(len(units))])
    chosen, kept = [], []
    for index in sorted({index for index, _ in taken}):
        if pieces[index].rows is None:
            chosen.append(pieces[index].content)
            kept.append(losses[index])
            continue
        rows = torch.tensor([row for other, row in taken if other == index])
        chosen.append(cut_rows(pieces[index].content, rows))
        kept.append(RowLosses(losses[index].sums[rows], losses[index].counts[rows]))
    return chosen, kept


def _rows_with_terms(piece: Piece, losses: RowLosses) -> list[int]:
    """The rows of a whole batch that have a term of the loss; of a batch that cannot be divided, 0 stands for all."""
    if piece.rows is None:
        return [0] if losses.counts.sum() > 0 else []
    return [row for row in piece.rows if losses.counts[row] > 0]
