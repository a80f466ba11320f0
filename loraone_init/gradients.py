"""Exact full-fine-tuning gradients of linear layers, G = Σ dYᵀX / N, one block's layers alive at a time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from .activations import ActivationBudget
from .errors import DataError, ModelError, NumericalError
from .experts import ExpertLinear
from .halving import MicroBatches, TooLargeError
from .monitor import Monitor
from .objective import Objective, RowLosses
from .products import add_product
from .ranks import Alone, Ranks
from .streaming import BlockStack, Trace, stream_backward, stream_forward
from .targets import layer_shape

WIDE_TOKENS = 2048
"""Tokens that are multiplied into a layer's gradient at a time."""


@dataclass(frozen=True)
class LayerGradient:
    """The gradient of one layer, fp32 (fp64 for an fp64 model): what each half of the sample adds to it, or all."""

    name: str
    parts: tuple[torch.Tensor, ...]

    @property
    def G(self) -> torch.Tensor:  # noqa: N802
        """∇_W L (out, in), the sum of the parts; of two, a new tensor each time."""
        return self.parts[0] if len(self.parts) == 1 else torch.add(*self.parts)

    @property
    def numel(self) -> int:
        """Of G."""
        return self.parts[0].numel()


class Collector:
    """Sums dYᵀX of the target layers, in fp32 or better whatever the model's dtype.

    The gradient of the weight itself is never asked for: a layer's input is kept by a forward hook and multiplied
    with the gradient of its output when that arrives. So frozen, tied and quantized weights work alike.
    Products wait until `WIDE_TOKENS` tokens are together: narrow ones spend their time on reading and writing the sum.

    num_parts: sums of each layer; `turn_to` says which of them what comes now adds to.
    """

    def __init__(self, targets: Mapping[str, nn.Module], num_parts: int = 1) -> None:
        self._targets = dict(targets)
        self._part = 0
        self._sums: list[dict[str, torch.Tensor]] = [{} for _ in range(num_parts)]
        self._waiting: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, every differentiated call of a target layer adds to its sum."""
        with ExitStack() as stack:
            for name, module in self._targets.items():
                hook = module.register_forward_hook(partial(self._after_forward, name), with_kwargs=True)
                stack.callback(hook.remove)
            yield

    def turn_to(self, part: int) -> None:
        """From now on, products add to this sum."""
        if part != self._part:
            for name in list(self._waiting):
                self._multiply(name)
            self._part = part

    def take(self, name: str, count: float) -> LayerGradient:
        """The finished gradient of the layer, sum / count; exactly zero if no gradient reached it. Drops the sums."""
        self._multiply(name)
        sums = [part.pop(name, None) for part in self._sums]
        other = next((G for G in sums if G is not None), None)
        return LayerGradient(name, tuple(self._zero(name, other) if G is None else G.div_(count) for G in sums))

    def _zero(self, name: str, other: torch.Tensor | None) -> torch.Tensor:
        """What stands for a sum that nothing was added to; other: one of the same layer that something was."""
        if other is not None:
            return torch.zeros_like(other)
        module = self._targets[name]
        tensors = [module.weight] if isinstance(module, ExpertLinear) else module.parameters()
        floating = (t.dtype for t in tensors if t.is_floating_point())
        dtype = torch.promote_types(next(floating, torch.float32), torch.float32)  # as other ranks' sums have it
        return torch.zeros(layer_shape(module), dtype=dtype)

    def _after_forward(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
    ) -> torch.Tensor | None:
        if not torch.is_grad_enabled():
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        if not output.requires_grad:  # below, nothing needs a gradient: start the graph here
            output = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        output.register_hook(partial(self._add, name, x.detach(), x._version))
        return output

    def _add(self, name: str, x: torch.Tensor, version: int, dY: torch.Tensor) -> None:
        if x._version != version:  # the product would be of another x, and nothing else would notice
            raise ModelError(f"the input of layer {name} is changed in place after the layer; its gradient is lost")
        self._waiting[name].append((_own(dY.reshape(-1, dY.shape[-1])), _own(x.reshape(-1, x.shape[-1]))))
        if sum(len(X) for _, X in self._waiting[name]) >= _wide(self._targets[name]):
            self._multiply(name)

    def _multiply(self, name: str) -> None:
        """Add the products that wait to the layer's sum."""
        waiting = self._waiting.pop(name, [])
        if not waiting:
            return
        dY, X = waiting[0] if len(waiting) == 1 else map(torch.cat, zip(*waiting, strict=True))
        sums = self._sums[self._part]
        sums[name] = add_product(sums.get(name), dY, X)


def _wide(module: nn.Module) -> int:
    """Tokens that wait, at most. Of many experts' tokens no more than take the memory of their gradients."""
    rows, columns = layer_shape(module)
    return min(WIDE_TOKENS, rows * columns // (rows + columns)) if isinstance(module, ExpertLinear) else WIDE_TOKENS


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, not a part of a larger one (all experts' tokens), which would be kept alive with it."""
    return tensor if tensor.untyped_storage().nbytes() <= tensor.nbytes else tensor.clone()


def stream_gradients(
    stack: BlockStack,
    targets: Mapping[str, nn.Module],
    objective: Objective,
    batches: Sequence[Any],
    monitor: Monitor | None = None,
    budget: ActivationBudget | None = None,
    ranks: Ranks | None = None,
    halves: Sequence[int] | None = None,
) -> tuple[list[RowLosses], Iterator[LayerGradient]]:
    """Losses of all batches, and the gradient of their overall mean for every target layer.

    budget: memory for what the forward computes and the backward needs; without it, that is computed again.
    ranks:  the processes that share the work, one by default: `batches` and the losses are this one's, which may be
            none; the mean is that of all, and the gradients are those that this one is to decompose.
    halves: to which half of the sample, 0 or 1, each batch belongs; gradients then come in two parts.

    The forward runs now; the backward runs as the gradients are taken, last block first. The model has to be in eval
    mode with frozen parameters. Micro-batches that do not fit in memory are halved, and both begin anew.

    Raises DataError where no token is trained on, NumericalError where the loss is not finite, ResourceError where a
    single row does not fit in memory.
    """
    ranks = ranks or Alone()
    gradients = _Pass(stack, targets, objective, MicroBatches(batches, stack), monitor or Monitor(), ranks, halves)
    losses = gradients.forward(budget)
    order, count = _agree(stack, gradients.traces, losses, ranks)
    return losses, gradients.backward(order, count)


class _Pass:
    """One forward and backward; where memory runs out, another one for the layers that are still to come."""

    def __init__(
        self,
        stack: BlockStack,
        targets: Mapping[str, nn.Module],
        objective: Objective,
        batches: MicroBatches,
        monitor: Monitor,
        ranks: Ranks,
        halves: Sequence[int] | None,
    ) -> None:
        self.traces: list[Trace] = []
        self._stack = stack
        self._waiting = dict(targets)
        self._objective = objective
        self._batches = batches
        self._monitor = monitor
        self._ranks = ranks
        self._halves = halves
        self._collector = self._new_collector()
        self._shared: set[int] = set()  # blocks whose gradients have gone out

    def forward(self, budget: ActivationBudget | None) -> list[RowLosses]:
        """The losses of all batches; the traces are here after."""
        first = [budget]  # a retry keeps no activations
        return self._batches.attempt(lambda parts: self._forward(parts, first.pop() if first else None))

    def backward(self, order: Sequence[int], count: float) -> Iterator[LayerGradient]:
        """order: of the blocks that were called. count: of the terms of the mean."""
        while True:
            try:
                yield from self._backward(order, count)
                break
            except TooLargeError as error:
                index, block = error.index, error.block
            self.traces, self._collector = [], self._new_collector()
            self._batches.halve(index, block)
            self.forward(None)
        # layers outside of all blocks, or never reached
        yield from self._ranks.share(self._collector.take(name, count) for name in self._waiting)

    def _forward(self, parts: list[Any], budget: ActivationBudget | None) -> list[RowLosses]:
        self._collector = self._new_collector()
        trained = frozenset(i for i, block in enumerate(self._stack.names) if _within(self._waiting, block))
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

    def _backward(self, order: Sequence[int], count: float) -> Iterator[LayerGradient]:
        with self._collector.attached():
            for done, block in enumerate(stream_backward(self._stack, self.traces, order, self._turn), start=1):
                self._monitor.step("backward", done, len(order))
                if block in self._shared:  # by the pass that was broken off
                    continue
                self._shared.add(block)
                names = _within(self._waiting, self._stack.names[block])
                for name in names:
                    del self._waiting[name]
                yield from self._ranks.share(self._collector.take(name, count) for name in names)


def _agree(
    stack: BlockStack, traces: list[Trace], losses: list[RowLosses], ranks: Ranks
) -> tuple[tuple[int, ...], float]:
    """The blocks in the order of the calls that were kept, and the number of terms of all ranks' losses."""
    total, count = sum_losses(losses)
    if count:
        _check_finite(total / count)  # by the rank that it belongs to
    own = tuple(call.block for call in traces[0].calls) if traces else None
    parts = ranks.gather((own, losses))
    _, count = check_losses([rows for _, part in parts for rows in part])
    orders = {order for order, _ in parts if order is not None}
    if len(orders) != 1:
        called = "; ".join(", ".join(stack.names[block] for block in order) for order in sorted(orders))
        raise ModelError(f"the processes take different ways through the model ({called}); use one process")
    return orders.pop(), count


def stream_losses(
    stack: BlockStack,
    objective: Objective,
    batches: Sequence[Any],
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> list[RowLosses]:
    """Losses of all batches, no gradients. on_step: told the number of blocks that are done, and of all."""
    divided = MicroBatches(batches, stack)

    def run(parts: list[Any]) -> list[RowLosses]:
        losses: dict[int, RowLosses] = {}

        def finish(index: int, features: Any) -> None:
            with torch.no_grad():
                losses[index] = objective.finish(features, parts[index], backward=False)

        with objective.active():
            stream_forward(stack, [partial(objective.forward, part) for part in parts], finish, on_step=on_step)
        return divided.merge([losses[index] for index in range(len(parts))])

    return divided.attempt(run)


def check_losses(losses: Sequence[RowLosses]) -> tuple[float, float]:
    """(mean loss, number of terms) over all rows."""
    total, count = sum_losses(losses)
    if count == 0:
        raise DataError("the batches have no trainable tokens: every label is masked")
    _check_finite(total / count)
    return total / count, count


def sum_losses(losses: Sequence[RowLosses]) -> tuple[float, float]:
    """(summed loss, number of terms) over all rows."""
    return sum(float(rows.sums.sum()) for rows in losses), sum(float(rows.counts.sum()) for rows in losses)


def _check_finite(mean: float) -> None:
    if not math.isfinite(mean):
        raise NumericalError(f"the loss is {mean}; check the weights; in half precision, --dtype float32 may help")


def _within(names: Mapping[str, Any], block: str) -> list[str]:
    """The names that lie inside of `block`."""
    return [name for name in names if name.startswith(f"{block}.")]
