"""Exact full-fine-tuning gradients of linear layers, G = Σ dYᵀX / N, one block's layers alive at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from ..layers.experts import ExpertLinear
from ..linalg.layer_gradient import LayerGradient
from ..monitor import Monitor
from ..processes.processes import Alone, Processes
from ..streaming.activations import ActivationBudget
from ..streaming.calls import Trace
from ..streaming.driver import stream_backward, stream_forward
from ..streaming.stack import BlockStack
from ..streaming.too_large import TooLargeError
from .collector import Collector
from .losses import RowLosses, check_finite, check_losses, sum_losses
from .micro_batches import MicroBatches
from .objective import Objective
from .uncalled import check_uncalled


def stream_gradients(
    stack: BlockStack,
    targets: Mapping[str, nn.Module],
    objective: Objective,
    batches: Sequence[Any],
    monitor: Monitor | None = None,
    budget: ActivationBudget | None = None,
    processes: Processes | None = None,
    halves: Sequence[int] | None = None,
) -> tuple[list[RowLosses], Iterator[LayerGradient]]:
    """Losses of all batches, and the gradient of their overall mean for every target layer.

    budget: memory for what the forward computes and the backward needs; without it, that is computed again.
    processes: those that share the work, one by default: `batches` and the losses are this one's, which may be
            none; the mean is that of all, and the gradients are those that this one is to decompose.
    halves: to which half of the sample, 0 or 1, each batch belongs; gradients then come in two parts.

    The forward runs now; the backward runs as the gradients are taken, last block first. The model has to be in eval
    mode with frozen parameters. Micro-batches that do not fit in memory are halved, and both begin anew.

    Raises DataError where no token is trained on, NumericalError where the loss is not finite, ResourceError where a
    single row does not fit in memory.
    """
    processes = processes or Alone()
    divided = MicroBatches(batches, stack, objective.by_row)
    gradients = _Pass(stack, targets, objective, divided, monitor or Monitor(), processes, halves)
    losses = gradients.forward(budget)
    order, count, outside = _agree(stack, gradients, losses, processes)
    return losses, gradients.backward(order, count, outside)


class _Pass:
    """One forward and backward; where memory runs out, another one for the layers that are still to come."""

    def __init__(
        self,
        stack: BlockStack,
        targets: Mapping[str, nn.Module],
        objective: Objective,
        batches: MicroBatches,
        monitor: Monitor,
        processes: Processes,
        halves: Sequence[int] | None,
    ) -> None:
        self.traces: list[Trace] = []
        self._stack = stack
        self._waiting = dict(targets)
        self._objective = objective
        self._batches = batches
        self._monitor = monitor
        self._processes = processes
        self._halves = halves
        self._collector = self._new_collector()
        self._shared: set[int] = set()  # blocks that have been passed by the backward
        self._homes = _homes(stack, targets)

    def forward(self, budget: ActivationBudget | None) -> list[RowLosses]:
        """The losses of all batches; the traces are here after."""
        first = [budget]  # a retry keeps no activations
        return self._batches.attempt(lambda parts: self._forward(parts, first.pop() if first else None))

    @property
    def calls(self) -> tuple[set[str], set[str]]:
        """The layers that the forward called, and those that it called between blocks."""
        return self._collector.called, self._collector.outside

    def check_uncalled(self, called: set[str]) -> None:
        """called: by any process. See `uncalled.check_uncalled`."""
        if self._batches.parts:
            check_uncalled(self._stack, self._objective, self._waiting, called, self._batches.parts[0])

    def backward(self, order: Sequence[int], count: float, outside: set[str]) -> Iterator[LayerGradient]:
        """order: of the blocks that were called. count: of the terms of the mean. outside: layers that are called
        between blocks too.
        """
        while True:
            try:
                yield from self._backward(order, count, outside)
                break
            except TooLargeError as error:
                index, block = error.index, error.block
            self.traces, self._collector = [], self._new_collector()
            self._batches.halve(index, block)
            self.forward(None)
        # layers outside of all blocks, or never reached
        yield from self._processes.share(self._collector.take(name, count) for name in self._waiting)

    def _forward(self, parts: list[Any], budget: ActivationBudget | None) -> list[RowLosses]:
        self._collector = self._new_collector()
        trained = frozenset(block for name in self._waiting for block in self._homes[name])
        losses: dict[int, RowLosses] = {}

        def finish(index: int, features: Any) -> None:
            with self._monitor.timed("head"):
                losses[index] = self._objective.finish(features, parts[index], backward=True)

        with self._monitor.timed("forward"), self._collector.attached(), self._objective.active():
            forwards = [partial(self._objective.forward, part) for part in parts]
            on_step = partial(self._monitor.step, "forward")
            self.traces = stream_forward(self._stack, forwards, finish, trained, on_step, budget, self._turn)
        return self._batches.merge([losses[index] for index in range(len(parts))])

    def _new_collector(self) -> Collector:
        return Collector(self._waiting, 1 if self._halves is None else 2)

    def _turn(self, index: int) -> None:
        """What comes now is of this micro-batch."""
        if self._halves is not None:
            self._collector.turn_to(self._halves[self._batches.of[index]])

    def _backward(self, order: Sequence[int], count: float, outside: set[str]) -> Iterator[LayerGradient]:
        """A layer is taken when the last of the blocks that it is in has been passed, at the end if it is in none."""
        with self._collector.attached():
            for done, block in enumerate(stream_backward(self._stack, self.traces, order, self._turn), start=1):
                self._monitor.step("backward", done, len(order))
                if block in self._shared:  # by the pass that was broken off
                    continue
                self._shared.add(block)
                names = [
                    name
                    for name in self._waiting
                    if block in self._homes[name]
                    and name not in outside
                    and self._homes[name] & set(order) <= self._shared
                ]
                for name in names:
                    del self._waiting[name]
                yield from self._processes.share(self._collector.take(name, count) for name in names)


def _agree(
    stack: BlockStack, gradients: _Pass, losses: list[RowLosses], processes: Processes
) -> tuple[tuple[int, ...], float, set[str]]:
    """Of all processes: the blocks in the order of the calls that were kept, the number of terms of the losses, and
    the layers that are called between blocks.
    """
    traces = gradients.traces
    total, count = sum_losses(losses)
    if count:
        check_finite(total / count)  # by the process that it belongs to
    own = tuple(call.block for call in traces[0].calls) if traces else None
    parts = processes.gather((own, losses, *gradients.calls))
    _, count = check_losses([rows for _, part, _, _ in parts for rows in part])
    orders = {order for order, _, _, _ in parts if order is not None}
    if len(orders) != 1:
        called = "; ".join(", ".join(stack.names[block] for block in order) for order in sorted(orders))
        raise ModelError(f"the processes take different ways through the model ({called}); use one process")
    gradients.check_uncalled({name for _, _, called, _ in parts for name in called})
    return orders.pop(), count, {name for _, _, _, outside in parts for name in outside}


def stream_losses(
    stack: BlockStack,
    objective: Objective,
    batches: Sequence[Any],
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> list[RowLosses]:
    """Losses of all batches, no gradients. on_step: told the number of blocks that are done, and of all."""
    divided = MicroBatches(batches, stack, objective.by_row)

    def run(parts: list[Any]) -> list[RowLosses]:
        losses: dict[int, RowLosses] = {}

        def finish(index: int, features: Any) -> None:
            with torch.no_grad():
                losses[index] = objective.finish(features, parts[index], backward=False)

        with objective.active():
            stream_forward(stack, [partial(objective.forward, part) for part in parts], finish, on_step=on_step)
        return divided.merge([losses[index] for index in range(len(parts))])

    return divided.attempt(run)


def _homes(stack: BlockStack, targets: Mapping[str, nn.Module]) -> dict[str, set[int]]:
    """For each layer, the blocks that it is in: a module may be in several, under names of which it has one here."""
    blocks: dict[nn.Module, set[int]] = {}
    for block in range(len(stack.names)):
        for module in stack.module(block).modules():
            blocks.setdefault(module, set()).add(block)
    return {
        name: blocks.get(target.owner if isinstance(target, ExpertLinear) else target, set())
        for name, target in targets.items()
    }
