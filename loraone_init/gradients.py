"""Exact full-fine-tuning gradients of linear layers, G = Σ dYᵀX / N, one block's layers alive at a time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from .activations import ActivationBudget
from .errors import DataError, ModelError, NumericalError
from .experts import ExpertLinear
from .monitor import Monitor
from .objective import Objective, RowLosses
from .precision import full_precision
from .ranks import Alone, Ranks
from .streaming import BlockStack, Trace, stream_backward, stream_forward
from .targets import layer_shape

WIDE_TOKENS = 2048
"""Tokens that are multiplied into a layer's gradient at a time."""


@dataclass(frozen=True)
class LayerGradient:
    """G = ∇_W L (out, in) of one layer, fp32 (fp64 for an fp64 model)."""

    name: str
    G: torch.Tensor


class Collector:
    """Sums dYᵀX of the target layers, in fp32 or better whatever the model's dtype.

    The gradient of the weight itself is never asked for: a layer's input is kept by a forward hook and multiplied
    with the gradient of its output when that arrives. So frozen, tied and quantized weights work alike.
    Products wait until `WIDE_TOKENS` tokens are together: narrow ones spend their time on reading and writing the sum.
    """

    def __init__(self, targets: Mapping[str, nn.Module]) -> None:
        self._targets = dict(targets)
        self._sums: dict[str, torch.Tensor] = {}
        self._waiting: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, every differentiated call of a target layer adds to its sum."""
        with ExitStack() as stack:
            for name, module in self._targets.items():
                hook = module.register_forward_hook(partial(self._after_forward, name), with_kwargs=True)
                stack.callback(hook.remove)
            yield

    def take(self, name: str, count: float) -> LayerGradient:
        """The finished gradient of the layer, sum / count; exactly zero if no gradient reached it. Drops the sum."""
        self._multiply(name)
        G = self._sums.pop(name, None)
        if G is None:
            module = self._targets[name]
            tensors = [module.weight] if isinstance(module, ExpertLinear) else module.parameters()
            floating = (t.dtype for t in tensors if t.is_floating_point())
            dtype = torch.promote_types(next(floating, torch.float32), torch.float32)  # as other ranks' sums have it
            return LayerGradient(name, torch.zeros(layer_shape(module), dtype=dtype))
        return LayerGradient(name, G.div_(count))

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
        dtype = torch.promote_types(waiting[0][1].dtype, torch.float32)
        dY = torch.cat([dY for dY, _ in waiting]).to(dtype)
        X = torch.cat([X for _, X in waiting]).to(dtype)
        with full_precision(X.device):
            if name in self._sums:
                self._sums[name].addmm_(dY.T, X)
            else:
                self._sums[name] = dY.T @ X


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
) -> tuple[list[RowLosses], Iterator[LayerGradient]]:
    """Losses of all batches, and the gradient of their overall mean for every target layer.

    budget: memory for what the forward computes and the backward needs; without it, that is computed again.
    ranks:  the processes that share the work, one by default: `batches` and the losses are this one's, which may be
            none; the mean is that of all, and the gradients are those that this one is to decompose.

    The forward runs now; the backward runs as the gradients are taken, last block first. The model has to be in eval
    mode with frozen parameters.

    Raises DataError where no token is trained on, NumericalError where the loss is not finite.
    """
    monitor = monitor or Monitor()
    collector = Collector(targets)
    trained = frozenset(index for index, block in enumerate(stack.names) if _within(targets, block))
    losses: dict[int, RowLosses] = {}

    def finish(index: int, features: Any) -> None:
        with monitor.timed("head"):
            losses[index] = objective.finish(features, batches[index], backward=True)

    with monitor.timed("forward"), collector.attached(), objective.active():
        forwards = [partial(objective.forward, batch) for batch in batches]
        traces = stream_forward(stack, forwards, finish, trained, partial(monitor.step, "forward"), budget)
    ordered = [losses[index] for index in range(len(batches))]
    ranks = ranks or Alone()
    order, count = _agree(stack, traces, ordered, ranks)
    return ordered, _backward(stack, targets, collector, traces, order, count, monitor, ranks)


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


def _backward(
    stack: BlockStack,
    targets: Mapping[str, nn.Module],
    collector: Collector,
    traces: list[Trace],
    order: Sequence[int],
    count: float,
    monitor: Monitor,
    ranks: Ranks,
) -> Iterator[LayerGradient]:
    waiting = dict.fromkeys(targets)
    with collector.attached():
        for done, block in enumerate(stream_backward(stack, traces, order), start=1):
            monitor.step("backward", done, len(order))
            names = _within(waiting, stack.names[block])
            for name in names:
                del waiting[name]
            yield from ranks.share(collector.take(name, count) for name in names)
    # layers outside of all blocks, or never reached
    yield from ranks.share(collector.take(name, count) for name in waiting)


def stream_losses(stack: BlockStack, objective: Objective, batches: Sequence[Any]) -> list[RowLosses]:
    """Losses of all batches, no gradients."""
    losses: dict[int, RowLosses] = {}

    def finish(index: int, features: Any) -> None:
        with torch.no_grad():
            losses[index] = objective.finish(features, batches[index], backward=False)

    with objective.active():
        stream_forward(stack, [partial(objective.forward, batch) for batch in batches], finish)
    return [losses[index] for index in range(len(batches))]


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
