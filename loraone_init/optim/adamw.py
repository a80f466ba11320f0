"""AdamW for LoRA factors, with preconditioned gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from ..adapter.adapter import Adapter
from ..adapter.records import DEFAULT_PRECONDITIONER, Preconditioner
from ..errors import ConfigError
from .pairing import PairSource, check_held, find_pairs
from .preconditioning import precondition_pairs
from .stacking import Gradients

# Bare, without the hooks that torch wraps around the step of a class when it is first used: ours has its own.
_adamw_step = inspect.unwrap(torch.optim.AdamW.step)


class PreconditionedAdamW(torch.optim.AdamW):
    """AdamW whose gradients of LoRA factors are g_A ← (BᵀB + λI)⁻¹·g_A and g_B ← g_B·(AAᵀ + λI)⁻¹, by pairs (A, B).

    Both Gram matrices are of the factors before the step. Everything after that, from the moments on, is
    `torch.optim.AdamW`: its arguments, parameter groups and `state_dict`, which either class can load. Parameters in no
    pair (DoRA magnitudes, embeddings, biases) get plain AdamW. Source and scale-free form: see `preconditioning`.

        model = PeftModel.from_pretrained(base, "adapters", is_trainable=True)
        optimizer = PreconditionedAdamW(model.parameters(), model, lr=2e-4)

    pairs:          a PEFT model; an Adapter, whose own tensors are trained; LoraPairs by layer name; or FactorPairs.
                    They are fixed from then on.
    preconditioner: kind and damping. By default what the Adapter records, if `pairs` is one, else
                    DEFAULT_PRECONDITIONER: scale-free, δ = 0.1, since in the absolute form the effective step collapses
                    as the factors grow (see `preconditioning`; benchmarks/damping.py has the measurement). For a PEFT
                    model: `Adapter.load("adapters").preconditioner`.
    damping:        λ (or δ) in place of the preconditioner's.

    Maths in fp32 at least. `.grad` holds the same after a step as before it. The host waits for the device once a step,
    so that a step can't be captured in a CUDA graph.

    Raises ConfigError for pairs and parameters that do not fit together, and from `step` for a closure; NumericalError
    from `step` where a factor's Gram matrix cannot be inverted.
    """

    def __init__(
        self,
        params: ParamsT,
        pairs: PairSource,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        preconditioner: Preconditioner | None = None,
        damping: float | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            fused=fused,
        )
        recorded = pairs.preconditioner if isinstance(pairs, Adapter) else DEFAULT_PRECONDITIONER
        chosen = preconditioner or recorded
        self.preconditioner = chosen if damping is None else replace(chosen, damping=damping)
        self.pairs = tuple(find_pairs(pairs))
        self._logged: set[str] = set()
        check_held(self.pairs, self.param_groups)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step. Raises ConfigError for a closure, NumericalError where a Gram matrix cannot be inverted."""
        if closure is not None:
            raise ConfigError(
                "PreconditionedAdamW takes no closure: it would compute gradients anew after they were preconditioned; "
                "call it before step()"
            )
        with torch.no_grad(), self._preconditioned():
            _adamw_step(self)

    @contextmanager
    def _preconditioned(self) -> Iterator[None]:
        """Preconditioned gradients in `.grad` inside, the original ones after."""
        gradients = [(pair.A.grad, pair.B.grad) for pair in self.pairs]
        kind, damping = self.preconditioner.kind, self.preconditioner.damping
        preconditioned = precondition_pairs(self.pairs, gradients, damping, kind, self._logged)
        try:
            self._set_gradients(preconditioned)
            yield
        finally:
            self._set_gradients(gradients)

    def _set_gradients(self, gradients: list[Gradients]) -> None:
        for pair, (grad_A, grad_B) in zip(self.pairs, gradients, strict=True):
            pair.A.grad, pair.B.grad = grad_A, grad_B

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: torch alone would keep only its own attributes."""
        own = {"pairs": self.pairs, "preconditioner": self.preconditioner, "_logged": self._logged}
        return super().__getstate__() | own
