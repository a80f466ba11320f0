"""The sums of dYᵀX that are the gradients of linear layers, collected by hooks while a model is differentiated."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from ..layers.experts import ExpertLinear
from ..layers.targets import layer_shape
from ..linalg.layer_gradient import LayerGradient
from ..linalg.products import add_product
from ..streaming.coroutines import running
from ..streaming.taps import tapped

WIDE_TOKENS = 512
"""Tokens that are worth waiting for with any layer. With more, what waits in all layers of a large model that is run as
a whole takes as much memory as its activations, and the products gain a few percent."""


class Collector:
    """Sums dYᵀX of the target layers, in fp32 or better whatever the model's dtype.

    The gradient of the weight itself is never asked for: a layer's input is kept by a forward hook and multiplied
    with the gradient of its output when that arrives. So frozen, tied and quantized weights work alike. The output
    is tapped (see `tapped`), since a hook on it would be lost where a model goes on to change a view in place.
    Products wait until enough tokens are together (see `_wide`): narrow ones are mostly reading and writing of the sum.

    num_parts: sums of each layer; `turn_to` says which of them what comes now adds to.
    called, outside: the layers that were called at all, and those that were called between blocks.
    """

    def __init__(self, targets: Mapping[str, nn.Module], num_parts: int = 1) -> None:
        self.called: set[str] = set()
        self.outside: set[str] = set()
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
        self.called.add(name)
        if running():
            self.outside.add(name)
        if not torch.is_grad_enabled():
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        _check_product(name, module, x, output)
        add = partial(self._add, name, x.detach(), x._version)
        return tapped(output, add)

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


def _check_product(name: str, module: nn.Module, x: Any, output: Any) -> None:
    """Raise ModelError where a layer does not compute x·Wᵀ, by the shapes: dYᵀX would be no gradient of its weight."""
    out, inner = layer_shape(module)
    if not isinstance(output, torch.Tensor) or output.shape != (*x.shape[:-1], out) or x.shape[-1] != inner:
        given = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise ModelError(
            f"layer {name} of shape {(out, inner)} takes {tuple(x.shape)} to {given}, which is not x·Wᵀ; leave it out"
            f' with `exclude_modules="{name.rpartition(".")[2]}"`'
        )


def _wide(module: nn.Module) -> int:
    """Tokens worth waiting for: from then on, putting dY and X together moves as many bytes as the sum has, and what
    waits takes as much memory.
    """
    rows, columns = layer_shape(module)
    return min(WIDE_TOKENS, rows * columns // (rows + columns))


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, not a part of a larger one (all experts' tokens), which would be kept alive with it."""
    return tensor if tensor.untyped_storage().nbytes() <= tensor.nbytes else tensor.clone()
