"""Each layer's start: the decomposition of its gradient, its rank, its factors at γ = 1, and what is reported of it."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
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
from ..linalg.subspaces import split_half_agreements
from ..linalg.svd import TruncatedSVD, svd_bytes, truncated_svds

BATCH_BYTES = 2**28
"""What the SVDs of one batch take on a GPU, about. Gradients that wait for others of their shape, and what is left of a
batch while its slowest layers converge, take as much again each.
"""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerSettings:
    """What an adapter that is in a model already has for each layer: the rank, and the scale s of B·A."""

    ranks: Mapping[str, int]
    scales: Mapping[str, float]


def rank_limits(
    targets: Mapping[str, nn.Module], config: InitConfig, settings: LayerSettings | None = None
) -> tuple[InitConfig, dict[str, int]]:
    """The configuration with the rank that the scale s follows from, and the rank up to which each layer is decomposed.

    A layer smaller than the rank gets what its shape allows, and the log says so: the gate of a shared expert has a
    single output. Raises ConfigError where the rank is larger than every layer allows; likewise for a budget.
    """
    shapes = {name: layer_shape(module) for name, module in targets.items()}
    if settings is not None:
        _check_ranks(settings.ranks, shapes)
        return config, {name: settings.ranks[name] for name in shapes}
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

    agreement: how well the two halves of the sample agree (see `split_half_agreements`); None for a gradient that was
               not taken in halves.
    """

    svd: TruncatedSVD
    agreement: tuple[float, float] | None


@dataclass(frozen=True)
class _Kind:
    """What gradients have in common that are decomposed in one batch."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    num_parts: int
    limit: int

    @property
    def svd_bytes(self) -> int:
        """About what the SVD of one of them takes."""
        return svd_bytes(self.shape, self.limit, self.dtype.itemsize)


def decompose_layers(
    gradients: Iterator[LayerGradient],
    limits: Mapping[str, int],
    config: InitConfig,
    batch_bytes: int | None = None,
) -> Iterator[tuple[str, Decomposition]]:
    """The name and the decomposition of each layer, G ≈ U·diag(S)·Vh of the rank that is its limit.

    Gradients of equal shape wait for each other and are decomposed in one batch. Each is dropped once its decomposition
    is there.

    batch_bytes: once the SVDs of those that wait would take so much memory, one batch is decomposed. By default 0 on a
                 CPU, where batches gain nothing, so that each is dropped before the next one is asked for; and 256 MiB
                 on a GPU, which small kernels leave idle.

    Raises NumericalError, with the layer's name, where a gradient is not finite.
    """
    waiting: dict[_Kind, list[LayerGradient]] = defaultdict(list)
    while (gradient := next(gradients, None)) is not None:
        part = gradient.parts[0]
        shape = (part.shape[0], part.shape[1])
        kind = _Kind(shape, part.dtype, part.device, len(gradient.parts), limits[gradient.name])
        most = (0 if part.device.type == "cpu" else BATCH_BYTES) if batch_bytes is None else batch_bytes
        waiting[kind].append(gradient)
        del gradient, part
        if sum(kind.svd_bytes * len(alike) for kind, alike in waiting.items()) >= most:
            largest = max(waiting, key=lambda kind: kind.svd_bytes * len(waiting[kind]))
            yield from _decompose(waiting.pop(largest), largest.limit, config)
    while waiting:
        kind, alike = waiting.popitem()
        yield from _decompose(alike, kind.limit, config)


def _decompose(alike: list[LayerGradient], limit: int, config: InitConfig) -> list[tuple[str, Decomposition]]:
    """Of gradients of one kind, in one batch."""
    generators = [layer_generator(config.seed, gradient.name) for gradient in alike]
    agreements: list[tuple[float, float] | None] = [None] * len(alike)
    host = torch.device("cpu")
    try:
        svds = truncated_svds([gradient.G for gradient in alike], limit, generators=generators, device=host)
        if len(alike[0].parts) == 2:
            agreements = split_half_agreements(alike, min(config.rank, limit), config.seed)
    except NumericalError as error:
        name = next((gradient.name for gradient in alike if not gradient.G.isfinite().all()), alike[0].name)
        raise NumericalError(
            f"the gradient of layer {name} is not finite; check the weights; in half precision,"
            ' `dtype="float32"` may help'
        ) from error
    found = map(Decomposition, svds, agreements)
    return [(gradient.name, decomposition) for gradient, decomposition in zip(alike, found, strict=True)]


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
