"""What an initialisation in place has found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..adapter.overview import as_html, as_text, one_line, overview
from ..adapter.records import Curve, LayerReport, LossReport


@dataclass(frozen=True, repr=False)
class InitReport:
    """What `initialize_peft` has found; the factors themselves are in the model.

    gamma:          γ of the factors.
    loss:           the losses before and after the step, and on which rows; with "auto", those of all γ tried.
    layers:         of each layer: the gradient's norm and singular values, captured energy, the SVD's accuracy.
    scales:         s of each layer; its step has the length s/γ.
    num_parameters: of all factors.
    seconds:        by stage.
    record:         what an adapter file's metadata would say (see docs/format.md).
    """

    gamma: float
    loss: LossReport
    layers: Mapping[str, LayerReport]
    scales: Mapping[str, float]
    num_parameters: int
    seconds: Mapping[str, float]
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def before(self) -> float:
        """Mean loss of the base model."""
        return self.loss.before

    @property
    def after(self) -> float | None:
        """Mean loss with the step; None where it is not finite."""
        return self.loss.after

    @property
    def curve(self) -> Curve:
        """(γ, mean loss) of all that were tried; empty where γ was given."""
        return self.loss.curve

    @property
    def ranks(self) -> dict[str, int]:
        """Of each layer."""
        return {name: len(layer.singular_values) for name, layer in self.layers.items()}

    def __repr__(self) -> str:
        return one_line([*self.ranks.values()], self.gamma, asdict(self.loss), None, called="InitReport")

    def summary(self) -> str:
        """A table in text: layers, scale, data, losses, what was captured of the gradient, seconds."""
        return as_text(self._lines())

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return as_html(repr(self), self._lines())

    def _lines(self) -> list[tuple[str, str]]:
        lines = dict(overview(self.record, [*self.ranks.values()], self.num_parameters))
        least, most = min(self.scales.values()), max(self.scales.values())
        if least != most:
            lines["scale"] = f"s = {least:.4g} to {most:.4g} by layer, γ = {self.gamma:g}"
        lines["seconds"] = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self.seconds.items())
        return [*lines.items()]
