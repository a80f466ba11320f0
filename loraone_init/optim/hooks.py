"""Preconditioned gradients for an optimizer that is there already, such as the one that a trainer has made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from ..adapter.records import DEFAULT_PRECONDITIONER, Preconditioner
from ..errors import ConfigError
from .pairing import PairSource, check_held, find_pairs
from .preconditioning import precondition_pairs
from .stacking import FactorPair, Gradients


class StepHooks:
    """Around each step of an optimizer, gradients of LoRA factors are preconditioned; `remove` ends it.

    pairs: the factors whose gradients are preconditioned.
    """

    def __init__(self, optimizer: Optimizer, pairs: Sequence[FactorPair], preconditioner: Preconditioner) -> None:
        self.pairs = tuple(pairs)
        self.preconditioner = preconditioner
        self._logged: set[str] = set()
        self._gradients: list[Gradients] = []
        self._handles = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        )

    def remove(self) -> None:
        """From now on, steps are the optimizer's own."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(value is not None for value in (*args[1:], kwargs.get("closure"))):
            raise ConfigError("preconditioned steps take no closure: it would compute gradients anew; call it before")
        self._gradients = [(pair.A.grad, pair.B.grad) for pair in self.pairs]
        kind, damping = self.preconditioner.kind, self.preconditioner.damping
        self._set(precondition_pairs(self.pairs, self._gradients, damping, kind, self._logged))

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._set(self._gradients)
        self._gradients = []

    def _set(self, gradients: Sequence[Gradients]) -> None:
        for pair, (grad_A, grad_B) in zip(self.pairs, gradients, strict=True):
            pair.A.grad, pair.B.grad = grad_A, grad_B


def precondition_steps(
    optimizer: Optimizer, pairs: PairSource, preconditioner: Preconditioner = DEFAULT_PRECONDITIONER
) -> StepHooks:
    """Have every later step of `optimizer` see preconditioned gradients, as those of `PreconditionedAdamW` do.

    It is for optimizers that others have made; `.grad` holds the same after a step as before it, and the optimizer's
    state, groups and schedule stay its own. With `torch.optim.AdamW` the steps are those of `PreconditionedAdamW`.

    pairs: a PEFT model, or what else `PreconditionedAdamW` takes.

    Raises ConfigError for pairs and parameters that do not fit together.
    """
    found = find_pairs(pairs)
    check_held(found, optimizer.param_groups)
    return StepHooks(optimizer, found, preconditioner)
