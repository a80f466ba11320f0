"""What an adapter says of itself: each layer's facts, groups of them, and what is out of the ordinary."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from statistics import median

import torch

from ..adapter.adapter import Adapter
from ..adapter.records import LayerReport
from ..linalg.factors import LoraPair
from .layer_names import Place, place_of

LOW_ENERGY = 0.5
"""A layer that captures less of ‖G‖² than this is out of the ordinary: most capture 0.8 and more."""

LARGE_SINE = 1e-2
"""A larger angle to the true singular subspaces is: the SVD iterates to 1e-3."""

FAR_NORM = 10.0
"""A gradient so many times larger or smaller than the median of its kind is an anomaly."""


@dataclass(frozen=True)
class LayerFacts:
    """A layer's report, where it is, and the singular values of s·B·A as the factors are now, descending."""

    name: str
    place: Place
    report: LayerReport
    step: tuple[float, ...]

    @property
    def step_norm(self) -> float:
        """‖s·B·A‖_F."""
        return math.hypot(*self.step)

    def energy_at(self, rank: int) -> float:
        """Share of ‖G‖²_F in its leading `rank` singular values."""
        norm = self.report.gradient_norm
        return sum(value**2 for value in self.report.singular_values[:rank]) / norm**2 if norm else 1.0


@dataclass(frozen=True)
class Anomaly:
    """Something to look at. layer: the first where there are several alike."""

    layer: str
    text: str


def layer_facts(adapter: Adapter) -> list[LayerFacts]:
    """Facts of every layer, in the model's order."""
    return [
        LayerFacts(name, place_of(name), report, delta_spectrum(adapter.pairs[name], adapter.config.scale))
        for name, report in adapter.layers.items()
    ]


def delta_spectrum(pair: LoraPair, scale: float) -> tuple[float, ...]:
    """Singular values of s·B·A, r of them: those of s·R_B·R_Aᵀ, the (r, r) triangles of B = Q·R_B and Aᵀ = P·R_A."""
    R_B, R_A = (torch.linalg.qr(factor.double(), mode="r").R for factor in (pair.B, pair.A.T))
    return tuple((scale * torch.linalg.svdvals(R_B @ R_A.T)).tolist())


def by_kind(facts: list[LayerFacts]) -> dict[tuple[str, str], list[LayerFacts]]:
    """Layers by (stack, kind)."""
    groups: dict[tuple[str, str], list[LayerFacts]] = defaultdict(list)
    for fact in facts:
        groups[fact.place.stack, fact.place.kind].append(fact)
    return dict(groups)


def by_depth(facts: list[LayerFacts]) -> dict[tuple[str, int], list[LayerFacts]]:
    """Layers by (stack, depth); those outside of all stacks are in none."""
    groups: dict[tuple[str, int], list[LayerFacts]] = defaultdict(list)
    for fact in facts:
        if fact.place.depth is not None:
            groups[fact.place.stack, fact.place.depth].append(fact)
    return dict(groups)


def find_anomalies(facts: list[LayerFacts]) -> list[Anomaly]:
    """The gravest first."""
    grades: list[list[Anomaly]] = [[], [], [], [], []]
    for (_, kind), layers in by_kind(facts).items():
        typical = median(fact.report.gradient_norm for fact in layers)
        for fact in layers:
            for grade, text in _oddities(fact, kind, typical):
                grades[grade].append(Anomaly(fact.name, text))
    return [anomaly for grade in grades for anomaly in grade]


def _oddities(fact: LayerFacts, kind: str, typical: float) -> list[tuple[int, str]]:
    """(grade, text) of everything odd about one layer."""
    report, rank = fact.report, len(fact.report.singular_values)
    found = []
    if report.init == "standard":
        return [(0, "its gradient is zero: standard LoRA start, nothing of it is spectral")]
    if report.init == "partial":
        found.append((1, f"its gradient has rank {report.rank}, less than {rank}: the rest is a standard LoRA start"))
    if report.sine is not None and report.sine > LARGE_SINE:
        found.append((2, f"its singular subspaces are known to sin∠ ≤ {report.sine:.1e} only"))
    if report.captured_energy < LOW_ENERGY:
        found.append((3, f"rank {rank} captures {report.captured_energy:.0%} of ‖G‖² only"))
    if typical and not 1 / FAR_NORM <= report.gradient_norm / typical <= FAR_NORM:
        ratio = report.gradient_norm / typical
        times = f"{ratio:.3g} times" if ratio > 1 else f"1/{1 / ratio:.3g} of"
        found.append((4, f"‖G‖ = {report.gradient_norm:.1e} is {times} the median of {kind}"))
    return found
