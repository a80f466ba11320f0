"""Passes over samples, of which the first shows what the model can take."""

from __future__ import annotations

import logging
from dataclasses import replace

from torch import nn

from ..choosing.growing import SampleOrBatches, batches_of
from ..config import ALL_LINEAR, InitConfig
from ..gradients.uncalled import UncalledError
from .layer_starts import LayerSettings, rank_limits
from .padding import can_be_padded, unpadded
from .passes import GradientPass, PassResult

logger = logging.getLogger(__name__)


class SamplePasses:
    """What the first pass has shown holds for those after it: layers that nothing calls are left out, and rows of one
    length go together where the model cannot be padded.

    gradient_pass: as begun with.
    wanted:        the configuration as given, which ranks are settled by anew where layers are left out.
    settings:      see `Inputs`.
    in_halves:     see `GradientPass.run`.
    """

    def __init__(
        self, gradient_pass: GradientPass, wanted: InitConfig, settings: LayerSettings | None, in_halves: bool
    ) -> None:
        self._pass = gradient_pass
        self._wanted = wanted
        self._settings = settings
        self._in_halves = in_halves
        self._can_be_padded: bool | None = None  # unknown until a pass has had padded rows

    @property
    def targets(self) -> dict[str, nn.Module]:
        """The layers that are left."""
        return dict(self._pass.targets)

    @property
    def config(self) -> InitConfig:
        return self._pass.config

    def take(self, sample: SampleOrBatches) -> PassResult:
        """A pass over a sample, begun anew where it shows that rows cannot be padded."""
        batches = batches_of(self.as_run(sample))
        result = self._run(batches)
        if self._can_be_padded is None:
            made = self._pass
            self._can_be_padded = can_be_padded(made.stack, made.objective, batches, result.losses, made.processes)
            if self._can_be_padded is False:
                return self.take(sample)
        return result

    def as_run(self, given: SampleOrBatches) -> SampleOrBatches:
        """The sample or batches in the form in which the model can take them."""
        return unpadded(given) if self._can_be_padded is False else given

    def _run(self, batches: list[object]) -> PassResult:
        try:
            return self._pass.run(batches, in_halves=self._in_halves)
        except UncalledError as error:
            targets = self._without_uncalled(error)
        # out here the error, and all that its frames hold, is gone
        config, limits = rank_limits(targets, self._wanted, self._settings)
        self._pass = replace(self._pass, targets=targets, config=config, limits=limits)
        return self._pass.run(batches, in_halves=self._in_halves)

    def _without_uncalled(self, error: UncalledError) -> dict[str, nn.Module]:
        """The targets without those that nothing calls, if they are only a part of "all-linear"; else it is an error.

        So it is with several processes, of which some may have no rows, and would not know.
        """
        targets = self._pass.targets
        left = {name: module for name, module in targets.items() if name not in error.layers}
        if self._wanted.target_modules != ALL_LINEAR or self._pass.processes.size > 1 or not left:
            raise error
        logger.warning(
            "%d of %d layers are left out, such as %s: they are never called, but the model reads their weights, so"
            " that an adapter would have no effect there",
            len(targets) - len(left),
            len(targets),
            error.layers[0],
        )
        return left
