"""Exact full-fine-tuning gradients of linear layers, G = Σ dYᵀX / N.

By two schedules that give the same gradients. Block by block, one block's layers are alive at a time; row by row, each
micro-batch goes forward and backward through the whole model at once, and the sums of all layers wait for the last one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..data.pieces import Piece, shares_of, split_in_halves, whole_batches
from ..errors import ModelError
from ..layers.experts import ExpertLinear
from ..linalg.layer_gradient import LayerGradient
from ..machine import release_memory
from ..monitor import Monitor
from ..processes.processes import Alone, Processes
from ..streaming.calls import Trace
from ..streaming.driver import stream_backward, stream_forward
from ..streaming.stack import BlockStack
from ..streaming.too_large import TooLargeError
from .collector import Collector
from .losses import RowLosses, check_finite, check_losses, join_losses, sum_losses
from .micro_batches import MicroBatches
from .objective import Objective
from .uncalled import check_uncalled

logger = logging.getLogger(__name__)

_Found = tuple[Piece, RowLosses]
"""A piece of a batch, and the losses of its rows."""


def stream_gradients(
    stack: BlockStack,
    targets: Mapping[str, nn.Module],
    objective: Objective,
    batches: Sequence[Any],
    monitor: Monitor | None = None,
    processes: Processes | None = None,
    in_halves: bool = False,
) -> tuple[list[RowLosses], Iterator[LayerGradient]]:
    """The losses of all batches, and the gradient of their overall mean for every target layer.

    processes: the processes that share the batches between them, this one alone by default. Each is given all batches
               and gets the losses of all of them, and the gradients of the layers that it is to decompose. A process
               may have no rows to run.
    in_halves: whether each gradient comes in two parts, one for each half of the sample (see `split_in_halves`).

    A stack that is run as a whole goes row by row: all is computed now. Where that runs out of memory in any process,
    the stack is divided, and all begin anew block by block. Then the forward runs now, and the backward as the
    gradients are taken, last block first; micro-batches that do not fit in memory are halved, and both begin anew. The
    model has to be in eval mode with frozen parameters.

    Raises DataError where no token is trained on, NumericalError where the loss is not finite, ResourceError where a
    single row does not fit in memory.
    """
    processes = processes or Alone()
    pieces = whole_batches(batches, objective.by_row)
    if in_halves:
        pieces = split_in_halves(pieces)
    own = MicroBatches(shares_of(pieces, processes.size)[processes.index], stack)
    monitor = monitor or Monitor()
    gradients = _Pass(stack, targets, objective, own, monitor, processes, in_halves)
    found = _forward(gradients, stack, processes, monitor)
    _check_own_losses(found)
    told = processes.gather(gradients.report(found))
    found_by_all = [each for report in told for each in report.found]
    _, count = check_losses([losses for _, losses in found_by_all])
    order = _common_order(stack, {report.order for report in told if report.order is not None})
    gradients.check_uncalled({name for report in told for name in report.called})
    outside = {name for report in told for name in report.outside}
    return join_losses(found_by_all), gradients.backward(order, count, outside)


def _forward(gradients: _Pass, stack: BlockStack, processes: Processes, monitor: Monitor) -> list[_Found]:
    """The losses of each micro-batch; the stack is divided where memory runs out while it is run as a whole."""
    found: list[_Found] | None = None
    if stack.is_whole:
        with suppress(TooLargeError):
            found = gradients.forward()
        if not all(processes.gather(found is not None)):
            logger.warning("Out of memory row by row: the run begins anew block by block")
            monitor.scheduled("blocks", "out of memory row by row")
            found = None
            gradients.forget()
            stack.divide()
            release_memory(stack.device)
    return gradients.forward() if found is None else found


@dataclass(frozen=True)
class _Report:
    """What a process tells the others of its forward.

    order:   the blocks in the order of the calls that were kept; None for a process that has no rows to run.
    found:   the losses of its pieces, which come without their content.
    called:  the layers that the forward called.
    outside: those of them that it called between blocks.
    """

    order: tuple[int, ...] | None
    found: list[_Found]
    called: set[str]
    outside: set[str]


class _Pass:
    """One forward and backward through all blocks.

    Where memory runs out in the backward, both begin anew, for the layers whose gradients have not gone out yet.
    """

    def __init__(
        self,
        stack: BlockStack,
        targets: Mapping[str, nn.Module],
        objective: Objective,
        micro_batches: MicroBatches,
        monitor: Monitor,
        processes: Processes,
        in_halves: bool,
    ) -> None:
        self.traces: list[Trace] = []
        self._stack = stack
        self._waiting = dict(targets)
        self._objective = objective
        self._micro_batches = micro_batches
        self._monitor = monitor
        self._processes = processes
        self._num_parts = 2 if in_halves else 1
        self._collector = self._new_collector()
        self._shared: set[int] = set()  # the blocks that the backward has passed
        self._targets = targets
        self._homes: dict[str, set[int]] = {}

    def forward(self) -> list[_Found]:
        """The losses of each micro-batch. The traces that the backward needs are kept.

        Raises TooLargeError where memory runs out while the model is run as a whole.
        """
        return self._run() if self._stack.is_whole else self._micro_batches.attempt(self._run)

    def forget(self) -> None:
        """Drop what an attempt has left: sums, and what blocks were given."""
        self.traces, self._collector = [], self._new_collector()

    def report(self, found: Sequence[_Found]) -> _Report:
        """What the other processes need to know of the forward that gave these losses."""
        order = tuple(call.request.block for call in self.traces[0].calls) if self.traces else None
        told = [(piece.without_content(), losses) for piece, losses in found]
        return _Report(order, told, self._collector.called, self._collector.outside)

    def check_uncalled(self, called: set[str]) -> None:
        """called: the layers that any process has called. See `uncalled.check_uncalled`."""
        if self._micro_batches.pieces:
            check_uncalled(self._stack, self._objective, self._waiting, called, self._micro_batches.pieces[0])

    def backward(self, order: Sequence[int], count: float, outside: set[str]) -> Iterator[LayerGradient]:
        """The gradients of all layers.

        order:   the blocks in the order of their calls.
        count:   the number of terms of the mean.
        outside: layers that are called between blocks too.
        """
        while True:
            try:
                yield from self._backward(order, count, outside)
                break
            except TooLargeError as error:
                index, block = error.index, error.block
            self.forget()
            self._micro_batches.halve(index, block)
            self.forward()
        # layers outside of all blocks, or never reached
        yield from self._processes.share(self._collector.take(name, count) for name in self._waiting)

    def _run(self) -> list[_Found]:
        self._collector = self._new_collector()
        self._homes = _homes(self._stack, self._targets)
        trained = frozenset(block for name in self._waiting for block in self._homes[name])
        pieces, in_blocks = self._micro_batches.pieces, bool(self._stack.names)
        losses: dict[int, RowLosses] = {}

        def finish(index: int, features: Any) -> None:
            with self._monitor.timed("head" if in_blocks else "backward"):
                content = pieces[index].content
                losses[index] = self._objective.finish(features, content, backward=True, retain_graph=in_blocks)

        def on_step(done: int, total: int) -> None:
            self._monitor.step("forward", done, total)
            if not in_blocks:
                self._monitor.step("backward", done, total)

        with self._monitor.timed("forward"), self._collector.attached(), self._objective.active():
            forwards = [partial(self._objective.forward, piece.content) for piece in pieces]
            self.traces = stream_forward(self._stack, forwards, finish, trained, on_step, self._turn)
        return [(piece, losses[index]) for index, piece in enumerate(pieces)]

    def _new_collector(self) -> Collector:
        return Collector(self._waiting, self._num_parts)

    def _turn(self, index: int) -> None:
        """Gradients that arrive from now on are of the micro-batch of this number."""
        self._collector.turn_to(self._micro_batches.pieces[index].half)

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


def _check_own_losses(found: Sequence[_Found]) -> None:
    """Raise NumericalError where this process's loss is not finite: the others' errors then name this process."""
    total, count = sum_losses([losses for _, losses in found])
    if count:
        check_finite(total / count)


def _common_order(stack: BlockStack, orders: set[tuple[int, ...]]) -> tuple[int, ...]:
    """The order of calls that all processes have seen. Raises ModelError where they have seen several."""
    if len(orders) != 1:
        called = "; ".join(", ".join(stack.names[block] for block in order) for order in sorted(orders))
        raise ModelError(f"the processes take different ways through the model ({called}); use one process")
    return next(iter(orders))


def stream_losses(
    stack: BlockStack,
    objective: Objective,
    batches: Sequence[Any],
    on_step: Callable[[int, int], None] = lambda done, total: None,
    processes: Processes | None = None,
) -> list[RowLosses]:
    """The losses of all batches, without gradients.

    on_step:   told the number of blocks that are done, and of all.
    processes: the processes that share the batches between them. Each gets the losses of the rows that are its own.
    """
    processes = processes or Alone()
    shares = shares_of(whole_batches(batches, objective.by_row), processes.size)
    own = MicroBatches(shares[processes.index], stack)

    def run() -> list[_Found]:
        pieces = own.pieces
        losses: dict[int, RowLosses] = {}

        def finish(index: int, features: Any) -> None:
            with torch.no_grad():
                losses[index] = objective.finish(features, pieces[index].content, backward=False)

        with objective.active():
            forwards = [partial(objective.forward, piece.content) for piece in pieces]
            stream_forward(stack, forwards, finish, on_step=on_step)
        return [(piece, losses[index]) for index, piece in enumerate(pieces)]

    return join_losses(own.attempt(run))


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
