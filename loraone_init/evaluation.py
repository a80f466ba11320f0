"""The loss before and after the step, on some of the rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from .adapter import LossReport
from .factors import LoraPair
from .gradients import check_losses, stream_losses, sum_losses
from .objective import Objective, RowLosses
from .ranks import Alone, Ranks, share_of
from .streaming import BlockStack


def num_evaluated(num_rows: int) -> int:
    """Rows to evaluate after the step: a quarter of them up to eight rows, then an eighth; at least one."""
    return max(1, min(num_rows // 4, max(8, num_rows // 8)))


MAX_DOUBLINGS = 10
"""How often γ is doubled in search of a step that lowers the loss: up to 1024 times as short a step."""


@contextmanager
def applied(pairs: Mapping[str, LoraPair], targets: Mapping[str, nn.Module], scale: float) -> Iterator[None]:
    """Inside, each target layer answers y + scale·B·(A·x): the adapter without changing a weight."""
    with ExitStack() as stack:
        for name, pair in pairs.items():
            hook = targets[name].register_forward_hook(partial(_add_update, pair, scale), with_kwargs=True)
            stack.callback(hook.remove)
        yield


def _add_update(
    pair: LoraPair, scale: float, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
) -> torch.Tensor:
    x = args[0] if args else next(iter(kwargs.values()))
    A, B = pair.A.to(x), pair.B.to(x)
    updated: torch.Tensor = output + scale * (x @ A.T @ B.T)
    return updated


def evaluate_step(
    stack: BlockStack,
    objective: Objective,
    batches: Sequence[Any],
    losses: Sequence[RowLosses],
    pairs: Mapping[str, LoraPair],
    targets: Mapping[str, nn.Module],
    scale: float,
    gamma: float,
    seed: int,
    ranks: Ranks | None = None,
    by_row: bool = False,
) -> LossReport:
    """Mean loss of W and of W + scale·B·A on some of the rows, drawn from `seed`.

    ranks:  the processes that share the work, one by default; all give the same report.
    by_row: whether they may divide a batch between them.

    If the step raises it, γ is doubled until one is found that lowers it: a step of scale·γ/γ'.
    """
    sample, _ = check_losses(losses)
    chosen, before_rows = _choose_rows(batches, losses, seed)
    before, _ = check_losses(before_rows)
    ranks = ranks or Alone()
    mine = [piece.batch for piece in share_of(chosen, ranks.rank, ranks.size, by_row)]

    def loss_at(step: float) -> float | None:
        with applied(pairs, targets, step):
            rows = stream_losses(stack, objective, mine)
        totals, counts = zip(*ranks.gather(sum_losses(rows)), strict=True)
        loss = sum(totals) / sum(counts)
        return loss if math.isfinite(loss) else None

    after = loss_at(scale)
    suggestion, suggested_loss = None, None
    if after is None or after > before:
        for doubling in range(1, MAX_DOUBLINGS + 1):
            loss = loss_at(scale / 2**doubling)
            if loss is not None and loss < before:
                suggestion, suggested_loss = gamma * 2**doubling, loss
                break
    num_rows = sum(len(rows.sums) for rows in before_rows)
    return LossReport(sample, num_rows, before, after, suggestion, suggested_loss)


def _choose_rows(batches: Sequence[Any], losses: Sequence[RowLosses], seed: int) -> tuple[list[Any], list[RowLosses]]:
    """Some rows of the batches, and their losses. A batch whose loss is one number is taken whole or not at all."""
    units = [(index, row) for index, rows in enumerate(losses) for row in range(len(rows.sums)) if rows.counts[row] > 0]
    order = torch.randperm(len(units), generator=torch.Generator().manual_seed(seed)).tolist()
    taken = sorted(units[i] for i in order[: num_evaluated(len(units))])
    chosen, kept = [], []
    for index in sorted({index for index, _ in taken}):
        rows = torch.tensor([row for other, row in taken if other == index])
        batch = batches[index]
        by_row = isinstance(batch, Mapping) and len(losses[index].sums) > 1
        chosen.append({key: value[rows] for key, value in batch.items()} if by_row else batch)
        kept.append(RowLosses(losses[index].sums[rows], losses[index].counts[rows]))
    return chosen, kept
