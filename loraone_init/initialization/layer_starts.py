"""Each layer's start: the decomposition of its gradient, its rank, its factors at γ = 1, and what is reported of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from ..adapter.records import LayerReport
from ..choosing.rank_allotment import choose_ranks
from ..config import InitConfig
from ..errors import ConfigError, NumericalError
from ..layers.expert_layout import ExpertStack
from ..layers.targets import layer_shape
from ..linalg.factors import LoraPair, spectral_init
from ..linalg.layer_gradient import LayerGradient
from ..linalg.seeding import layer_generator
from ..linalg.subspaces import split_half_agreement
from ..linalg.svd import TruncatedSVD, truncated_svd


@dataclass(frozen=True)
class LayerSettings:
    """What an adapter that is in a model already has for each layer: the rank, and the scale s of B·A."""

    ranks: Mapping[str, int]
    scales: Mapping[str, float]

    def scaled(self, pairs: Mapping[str, LoraPair], scale: float) -> dict[str, LoraPair]:
        """The factors with each layer's own scale in B, for those who multiply every layer's product by `scale`."""
        return {
            name: pair if self.scales[name] == scale else replace(pair, B=pair.B * (self.scales[name] / scale))
            for name, pair in pairs.items()
        }


def rank_limits(
    targets: Mapping[str, nn.Module], config: InitConfig, settings: LayerSettings | None = None
) -> tuple[InitConfig, dict[str, int]]:
    """The configuration with the rank that the scale s follows from, and the rank up to which each layer is decomposed.

    Raises ConfigError, naming the smallest layer, where the rank is larger than it allows; likewise for a budget.
    """
    shapes = {name: layer_shape(module) for name, module in targets.items()}
    if settings is not None:
        _check_ranks(settings.ranks, shapes)
        return config, {name: settings.ranks[name] for name in shapes}
    if config.rank_budget is not None:
        limits = config.rank_budget.limits(shapes)
        return replace(config, rank=config.rank_budget.average(len(shapes))), limits
    name = min(shapes, key=lambda name: min(shapes[name]))
    if config.rank > min(shapes[name]):
        raise ConfigError(
            f"rank {config.rank} is larger than layer {name} of shape {shapes[name]} allows; use"
            f" `rank={min(shapes[name])}` or less, or leave the layer out with `exclude_modules`"
        )
    return config, dict.fromkeys(shapes, config.rank)


def _check_ranks(ranks: Mapping[str, int], shapes: Mapping[str, tuple[int, int]]) -> None:
    for name, shape in shapes.items():
        if ranks[name] > min(shape):
            raise ConfigError(
                f"layer {name} of shape {shape} has rank {ranks[name]} in the adapter, but its gradient allows"
                f" {min(shape)} at most; give it a lower rank (`rank_pattern`), or leave it out (`exclude_modules`)"
            )


@dataclass(frozen=True)
class Decomposition:
    """What is kept of a layer's gradient. It is in host memory, so that the device holds nothing that grows with the
    number of layers.

    agreement: how well the two halves of the sample agree (see `split_half_agreement`); None for a gradient that was
               not taken in halves.
    """

    svd: TruncatedSVD
    agreement: tuple[float, float] | None


def decompose(gradient: LayerGradient, limit: int, config: InitConfig) -> Decomposition:
    """G ≈ U·diag(S)·Vh of rank `limit`. Raises NumericalError, with the layer's name, where G is not finite."""
    try:
        svd = truncated_svd(gradient.G, limit, generator=layer_generator(config.seed, gradient.name))
        in_halves = len(gradient.parts) == 2
        agreement = split_half_agreement(gradient, min(config.rank, limit), config.seed) if in_halves else None
    except NumericalError as error:
        raise NumericalError(
            f"the gradient of layer {gradient.name} is not finite; check the weights; in half precision,"
            ' `dtype="float32"` may help'
        ) from error
    return Decomposition(svd.on_host(), agreement)


def start_layers(
    decomposed: dict[str, Decomposition],
    limits: Mapping[str, int],
    experts: Mapping[str, ExpertStack],
    config: InitConfig,
) -> tuple[dict[str, LoraPair], dict[str, LayerReport]]:
    """The factors and the report of each layer, with the ranks that the budget gives if there is one, else `limits`.

    decomposed: is emptied, so that each decomposition is freed once its layer's factors are there.
    """
    ranks = {name: limits[name] for name in decomposed}
    if config.rank_budget is not None:
        svds = {name: found.svd for name, found in decomposed.items()}
        ranks = choose_ranks(svds, config.rank_budget.total(len(svds)), experts)
        del svds
    pairs: dict[str, LoraPair] = {}
    layers: dict[str, LayerReport] = {}
    for name, rank in ranks.items():
        found = decomposed.pop(name)
        svd = found.svd.first(rank)
        rows = layer_generator(config.seed, f"{name}, standard rows")
        pairs[name] = spectral_init(svd.U, svd.S, svd.Vh, 1.0, rows, rank=svd.rank)  # γ comes last
        layers[name] = _report(svd, found.agreement)
    return pairs, layers


def _report(svd: TruncatedSVD, agreement: tuple[float, float] | None) -> LayerReport:
    rank = len(svd.S)
    return LayerReport(
        shape=(len(svd.U), svd.Vh.shape[1]),
        singular_values=tuple(svd.S.double().tolist()),
        rank=svd.rank,
        gradient_norm=svd.norm,
        captured_energy=svd.captured_energy,
        residual=svd.residual,
        sine=svd.sine,
        svd_method=svd.method,
        svd_iterations=svd.iterations,
        init="spectral" if svd.rank == rank else "partial" if svd.rank else "standard",
        agreement=agreement,
    )
