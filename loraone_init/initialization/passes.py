"""Passes over samples: each one's losses, and what is left of all layers' gradients, shared by all processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass

from torch import nn

from ..choosing.growing import Drawn
from ..config import InitConfig
from ..data.pieces import Piece, share_of
from ..gradients.losses import RowLosses
from ..gradients.objective import Objective
from ..gradients.stream import stream_gradients
from ..linalg.layer_gradient import LayerGradient
from ..monitor import Monitor
from ..processes.processes import Processes
from ..streaming.activations import ActivationBudget
from ..streaming.stack import BlockStack
from .layer_starts import Decomposition, decompose


@dataclass(frozen=True)
class Passes:
    """What all passes of a run have in common.

    limits:      up to which rank each layer's gradient is decomposed.
    activations: what each pass may keep of them.
    by_row:      whether processes may divide a batch between them.
    """

    stack: BlockStack
    targets: Mapping[str, nn.Module]
    objective: Objective
    limits: Mapping[str, int]
    config: InitConfig
    activations: ActivationBudget | None
    monitor: Monitor
    processes: Processes
    by_row: bool

    def take(self, drawn: Drawn) -> tuple[list[RowLosses], dict[str, Decomposition]]:
        """The losses of a sample's batches, and the decompositions of all layers' gradients, in every process."""
        processes = self.processes
        mine = share_of(drawn.parts, processes.index, processes.size, self.by_row)
        own = [piece.batch for piece in mine]
        budget = copy(self.activations)  # a pass uses it up
        losses, gradients = stream_gradients(
            self.stack, self.targets, self.objective, own, self.monitor, budget, processes, drawn.halves_of(mine)
        )
        parts = processes.gather(self._decompose_layers(gradients))  # each process has decomposed its own
        decomposed = {name: found for part in parts for name, found in part.items()}
        return drawn.losses(_join_losses(processes, mine, losses)), {name: decomposed[name] for name in self.targets}

    def _decompose_layers(self, gradients: Iterator[LayerGradient]) -> dict[str, Decomposition]:
        """Takes the gradients one by one; each is dropped before the next is asked for."""
        decomposed: dict[str, Decomposition] = {}
        while True:
            with self.monitor.timed("backward"):
                gradient = next(gradients, None)
            if gradient is None:
                return decomposed
            with self.monitor.timed("svd"):
                decomposed[gradient.name] = decompose(gradient, self.limits[gradient.name], self.config)
            del gradient


def _join_losses(processes: Processes, pieces: Sequence[Piece], losses: Sequence[RowLosses]) -> list[RowLosses]:
    """The losses of all batches, from those of the pieces that the processes took; theirs follow in that order."""
    joined: dict[int, RowLosses] = {}
    for part in processes.gather([(piece.index, rows) for piece, rows in zip(pieces, losses, strict=True)]):
        for index, rows in part:
            joined[index] = joined[index].followed_by(rows) if index in joined else rows
    return [joined[index] for index in sorted(joined)]
