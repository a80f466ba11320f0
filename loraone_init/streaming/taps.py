"""A tensor whose gradient somebody takes note of as it passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_TRIGGER = torch.zeros((), device="cpu", requires_grad=True)
"""A function needs an input that requires a gradient for its outputs to require one; this one never gets any."""


def tapped(tensor: torch.Tensor, take: Callable[[torch.Tensor], None]) -> torch.Tensor:
    """The tensor as it is; `take` is called with whatever gradient reaches it, which then passes on.

    Where nothing below needs a gradient, the graph starts here. Unlike a leaf with its `.grad`, the graph does not hold
    the tensor: it is gone when the model is done with it. What comes out shares the storage, but is no view, so that it
    may be changed in place: a hook on a tensor would be lost then.
    """
    with torch.enable_grad():
        passed: torch.Tensor = _Tap.apply(_TRIGGER, tensor, take)  # type: ignore[no-untyped-call]
    return passed


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, trigger: torch.Tensor, tensor: torch.Tensor, take: Callable[[torch.Tensor], None]
    ) -> torch.Tensor:
        ctx.take = take
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        ctx.take(gradient)
        return None, gradient, None
