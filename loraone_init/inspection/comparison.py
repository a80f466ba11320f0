"""How far two adapters agree: principal angles between the subspaces they span, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..adapter.adapter import Adapter
from ..errors import AdapterError
from ..linalg.factors import LoraPair
from ..linalg.subspaces import principal_angles


@dataclass(frozen=True)
class LayerComparison:
    """Agreement of a layer's s·B·A in two adapters, of ranks r₁ and r₂; k = min(r₁, r₂).

    output_angles: principal angles between the columns of B₁ and B₂, in degrees, ascending, k of them.
    input_angles:  between the rows of A₁ and A₂.
    cosine:        ⟨Δ₁, Δ₂⟩_F / (‖Δ₁‖·‖Δ₂‖), Δ = s·B·A; 0 where one of them is zero.
    ratio:         ‖Δ₂‖_F / ‖Δ₁‖_F; None for Δ₁ = 0.
    """

    output_angles: tuple[float, ...]
    input_angles: tuple[float, ...]
    cosine: float
    ratio: float | None


@dataclass(frozen=True)
class Comparison:
    """The comparison of all layers that both adapters have, and the names of those that only one has."""

    layers: Mapping[str, LayerComparison]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]


def compare_adapters(first: Adapter, second: Adapter) -> Comparison:
    """Raises AdapterError where no layer is in both, or a layer has two shapes: they belong to different models."""
    common = [name for name in first.pairs if name in second.pairs]
    if not common:
        raise AdapterError(
            f"the adapters have no layer in common: {next(iter(first.pairs))} here, {next(iter(second.pairs))} there"
        )
    scales = first.config.scale, second.config.scale
    layers = {}
    for name in common:
        pairs = first.pairs[name], second.pairs[name]
        shapes = [(pair.B.shape[0], pair.A.shape[1]) for pair in pairs]
        if shapes[0] != shapes[1]:
            raise AdapterError(f"layer {name} has shape {shapes[0]} here and {shapes[1]} there: not of the same model")
        layers[name] = _compare(*pairs, *scales)
    return Comparison(
        layers,
        tuple(name for name in first.pairs if name not in second.pairs),
        tuple(name for name in second.pairs if name not in first.pairs),
    )


def _compare(one: LoraPair, two: LoraPair, scale_one: float, scale_two: float) -> LayerComparison:
    A1, B1, A2, B2 = (factor.double() for factor in (one.A, one.B, two.A, two.B))
    inner = scale_one * scale_two * ((B1.T @ B2) * (A1 @ A2.T)).sum()  # tr(A₁ᵀB₁ᵀB₂A₂), without any (out, in) matrix
    norm_one, norm_two = (
        float(scale * ((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt())
        for scale, A, B in ((scale_one, A1, B1), (scale_two, A2, B2))
    )
    cosine = float(inner) / (norm_one * norm_two) if norm_one and norm_two else 0.0
    return LayerComparison(
        principal_angles(B1, B2),
        principal_angles(A1.T, A2.T),
        max(-1.0, min(1.0, cosine)),
        norm_two / norm_one if norm_one else None,
    )
