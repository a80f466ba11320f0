"""Modules of one's own, streamed with blocks named, against whole-model autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from loraone_init.gradients.objective import WholeModel
from loraone_init.gradients.stream import stream_gradients
from loraone_init.layers.targets import select_targets
from loraone_init.models.blocks import find_blocks
from loraone_init.streaming.keeping import keeping
from loraone_init.streaming.stack import BlockStack
from loraone_init.weights.base import ResidentStore

from .causal import reference_gradients, relative_error

EXACT = 1e-10
"""fp64 on both sides; what is left is the order of summation."""

MEMORY = {"in memory": None, "on disk": 0}
"""Bytes for block inputs on the device; None sets no limit."""


class Blocks(nn.Module):
    """A module list `blocks`; subclasses say how a batch goes through."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)


def squares(model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, int]:
    y: torch.Tensor = model(batch)
    return (y**2).sum(), y.numel()


def make_inputs(width: int = 5, rows: tuple[int, ...] = (3, 4)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(n, width, generator=generator, dtype=torch.float64) for n in rows]


def gradients_of(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Callable[[nn.Module, Any], tuple[torch.Tensor, torch.Tensor | int]] = squares,
    memory: int | None = None,
    whole: bool = False,
) -> dict[str, torch.Tensor]:
    """Streamed by the blocks in `blocks`, or run as a whole; memory: see `MEMORY`."""
    model.double().requires_grad_(False)
    stack = BlockStack(model, find_blocks(model, "blocks"), ResidentStore())
    targets = select_targets(model, "all-linear")
    with keeping(memory) as keeper, stack.kept_by(keeper), stack.as_a_whole() if whole else nullcontext():
        _, gradients = stream_gradients(stack, targets, WholeModel(model, loss), batches)
        return {gradient.name: gradient.G for gradient in gradients}


def largest_error(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Callable[[nn.Module, Any], tuple[torch.Tensor, torch.Tensor | int]] = squares,
    memory: int | None = None,
) -> float:
    """Of all layers and both schedules, relative to whole-model autograd of the mean loss."""
    targets = select_targets(model, "all-linear")
    by_schedule = [gradients_of(model, batches, loss, memory, whole) for whole in (False, True)]

    def mean() -> torch.Tensor:
        parts = [loss(model, batch) for batch in batches]
        return sum(total for total, _ in parts) / sum(count for _, count in parts)

    truth = reference_gradients(model, targets, mean)
    return max(relative_error(found[name], truth[name]) for found in by_schedule for name in targets)
