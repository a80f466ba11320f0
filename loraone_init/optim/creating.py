"""The optimizer of a PEFT model in one call."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..adapter.files import FACTORS
from ..adapter.records import Preconditioner
from ..ranges import check_range
from .adamw import PreconditionedAdamW


def create_optimizer(
    model: nn.Module,
    *,
    lr: float,
    loraplus_ratio: float = 1.0,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    preconditioner: Preconditioner | None = None,
    damping: float | None = None,
) -> PreconditionedAdamW:
    """`PreconditionedAdamW` for all that a PEFT model trains.

        trainer = Trainer(model, arguments, optimizers=(create_optimizer(model, lr=2e-4), None))

    lr:             of A, and of all that is no LoRA factor: DoRA's magnitudes, embeddings, modules held whole.
    loraplus_ratio: the rate of B is so many times `lr` (LoRA+, arXiv 2402.12354); 1 for LoRA-One as published.
    weight_decay:   of matrices; vectors, such as magnitudes and biases, have none.

    PEFT's `create_riemannian_optimizer` adds λ = 1e-2 to the Gram matrices themselves (the absolute form here) and
    leaves the preconditioned gradients in `.grad`; here the damping is a share of their mean eigenvalue (see
    `Preconditioner`), and `.grad` is put back.

    Raises ConfigError for numbers out of range, and for a model without trainable factors.
    """
    check_range("learning_rate", lr, "lr")
    check_range("learning_rate", loraplus_ratio, "loraplus_ratio")
    groups: dict[tuple[bool, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_B = f".{FACTORS[1]}." in name
            groups.setdefault((is_B, parameter.ndim > 1), []).append((name, parameter))
    settings: list[dict[str, Any]] = [
        {
            "params": members,
            "lr": lr * loraplus_ratio if is_B else lr,
            "weight_decay": weight_decay if is_matrix else 0.0,
        }
        for (is_B, is_matrix), members in groups.items()
    ]
    return PreconditionedAdamW(
        settings, model, lr=lr, betas=betas, eps=eps, preconditioner=preconditioner, damping=damping
    )
