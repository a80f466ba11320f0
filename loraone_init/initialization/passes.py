"""A pass over a sample: forward and backward through all blocks, and each layer's start from its gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..adapter.records import LayerReport
from ..config import InitConfig
from ..gradients.losses import RowLosses
from ..gradients.objective import Objective
from ..gradients.stream import stream_gradients
from ..layers.experts import expert_stacks
from ..linalg.factors import LoraPair
from ..linalg.layer_gradient import LayerGradient
from ..monitor import Monitor
from ..processes.processes import Processes
from ..streaming.stack import BlockStack
from .layer_starts import Decomposition, decompose_layers, start_layers


@dataclass(frozen=True)
class PassResult:
    """What a pass over a sample gives, the same in every process.

    losses: the losses of each batch, before the step.
    pairs:  the factors of each layer for γ = 1.
    layers: what is reported of each layer.
    """

    losses: list[RowLosses]
    pairs: dict[str, LoraPair]
    layers: dict[str, LayerReport]


@dataclass(frozen=True, kw_only=True)
class GradientPass:
    """What passes over several samples have in common; `run` makes one.

    limits: the rank up to which each layer's gradient is decomposed.
    """

    stack: BlockStack
    targets: Mapping[str, nn.Module]
    objective: Objective
    limits: Mapping[str, int]
    config: InitConfig
    monitor: Monitor
    processes: Processes

    def run(self, batches: Sequence[Any], in_halves: bool) -> PassResult:
        """in_halves: whether two halves of the sample are compared, for the agreement that layers report."""
        losses, gradients = stream_gradients(
            self.stack,
            self.targets,
            self.objective,
            batches,
            self.monitor,
            self.processes,
            in_halves,
        )
        found = self.processes.gather(self._decompose_layers(gradients))  # each process has decomposed its own
        by_name = {name: decomposition for part in found for name, decomposition in part.items()}
        decomposed = {name: by_name.pop(name) for name in self.targets}
        del found, by_name
        with self.monitor.timed("svd"):
            pairs, layers = start_layers(decomposed, self.limits, expert_stacks(self.targets), self.config)
        return PassResult(losses, pairs, layers)

    def _decompose_layers(self, gradients: Iterator[LayerGradient]) -> dict[str, Decomposition]:
        with self.monitor.timed("svd"):
            return dict(decompose_layers(self._timed(gradients), self.limits, self.config))

    def _timed(self, gradients: Iterator[LayerGradient]) -> Iterator[LayerGradient]:
        """The same gradients; the time to get them belongs to the backward."""
        while True:
            with self.monitor.timed("backward"):
                gradient = next(gradients, None)
            if gradient is None:
                return
            yield gradient
            del gradient  # before the next one is asked for
