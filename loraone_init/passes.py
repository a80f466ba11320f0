"""Passes over samples: each one's losses, and what is left of all layers' gradients, shared by all processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass

from torch import nn

from .activations import ActivationBudget
from .block_stack import BlockStack
from .collector import LayerGradient
from .config import InitConfig
from .gradients import stream_gradients
from .growing import Drawn
from .layer_starts import Decomposition, decompose
from .monitor import Monitor
from .objective import Objective, RowLosses
from .ranks import Piece, Ranks, share_of


@dataclass(frozen=True)
class Passes:
    """What all passes of a run have in common.

    limits:      up to which rank each layer's gradient is decomposed.
    activations: what each pass may keep of them.
    by_row:      whether ranks may divide a batch between them.
    """

    stack: BlockStack
    targets: Mapping[str, nn.Module]
    objective: Objective
    limits: Mapping[str, int]
    config: InitConfig
    activations: ActivationBudget | None
    monitor: Monitor
    ranks: Ranks
    by_row: bool

    def take(self, drawn: Drawn) -> tuple[list[RowLosses], dict[str, Decomposition]]:
        """The losses of a sample's batches, and the decompositions of all layers' gradients, on every rank."""
        ranks = self.ranks
        mine = share_of(drawn.parts, ranks.rank, ranks.size, self.by_row)
        own = [piece.batch for piece in mine]
        budget = copy(self.activations)  # a pass uses it up
        losses, gradients = stream_gradients(
            self.stack, self.targets, self.objective, own, self.monitor, budget, ranks, drawn.halves_of(mine)
        )
        parts = ranks.gather(self._decompose_layers(gradients))  # each rank has decomposed its own
        decomposed = {name: found for part in parts for name, found in part.items()}
        return drawn.losses(_join_losses(ranks, mine, losses)), {name: decomposed[name] for name in self.targets}

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


def _join_losses(ranks: Ranks, pieces: Sequence[Piece], losses: Sequence[RowLosses]) -> list[RowLosses]:
    """The losses of all batches, from those of the pieces that the ranks took; theirs follow in order of ranks."""
    joined: dict[int, RowLosses] = {}
    for part in ranks.gather([(piece.index, rows) for piece, rows in zip(pieces, losses, strict=True)]):
        for index, rows in part:
            joined[index] = joined[index].followed_by(rows) if index in joined else rows
    return [joined[index] for index in sorted(joined)]
