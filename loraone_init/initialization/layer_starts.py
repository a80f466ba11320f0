"""Each layer's start: the decomposition of its gradient, its rank, its factors at γ = 1, and what is reported of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from ..adapter.records import LayerReport
from ..adapter.wording import describe_ranks
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

logger = logging.getLogger(__name__)


def rank_limits(targets: Mapping[str, nn.Module], config: InitConfig) -> tuple[InitConfig, dict[str, int]]:
    """The configuration with the rank that the scale s follows from, and the rank up to which each layer is decomposed.

    A layer smaller than the rank gets what its shape allows, and the log says so: the gate of a shared expert has a
    single output. Raises ConfigError where the rank is larger than every layer allows; likewise for a budget.
    """
    shapes = {name: layer_shape(module) for name, module in targets.items()}
    if config.rank_budget is not None:
        limits = config.rank_budget.limits(shapes)
        return replace(config, rank=config.rank_budget.average(len(shapes))), limits
    limits = {name: min(config.rank, *shape) for name, shape in shapes.items()}
    largest = max(shapes, key=lambda name: min(shapes[name]))
    if limits[largest] < config.rank:
        raise ConfigError(
            f"rank {config.rank} is larger than every layer allows, the largest being {largest} of shape"
            f" {shapes[largest]}; use `rank={limits[largest]}` or less"
        )
    smaller = [name for name, limit in limits.items() if limit < config.rank]
    if smaller:
        logger.info(
            "Layers smaller than rank %d: %d, such as %s of shape %s; their ranks are %s, their scale is the others'",
            config.rank,
            len(smaller),
            smaller[0],
            shapes[smaller[0]],
            describe_ranks([limits[name] for name in smaller]),
        )
    return config, limits


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
    decomposed: dict[str, Decomposition], experts: Mapping[str, ExpertStack], config: InitConfig
) -> tuple[dict[str, LoraPair], dict[str, LayerReport]]:
    """The factors and the report of each layer, with the ranks that the budget gives if there is one.

    decomposed: is emptied, so that each decomposition is freed once its layer's factors are there.
    """
    ranks = {name: min(config.rank, len(found.svd.S)) for name, found in decomposed.items()}
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
