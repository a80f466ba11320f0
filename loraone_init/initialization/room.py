"""How much memory is left for block inputs and activations, beside the weights and what a micro-batch needs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..machine import describe_size, free_memory, used_memory
from ..models.opening import OpenModel
from ..streaming.activations import ActivationBudget
from .estimate import estimate_memory

logger = logging.getLogger(__name__)

_SHARE = 0.9  # of free memory that is counted on, since what a run needs is an estimate


@dataclass(frozen=True)
class SpareMemory:
    """Memory for what a run may keep between forward and backward.

    device_bytes, host_bytes: for the inputs of blocks, on the device and in host memory (see `streaming.keeping`);
                              None sets no limit.
    activations:              for what blocks compute; None keeps none.
    """

    device_bytes: int | None
    host_bytes: int | None
    activations: ActivationBudget | None


def find_spare_memory(
    opened: OpenModel,
    targets: Mapping[str, nn.Module],
    batches: Sequence[Any],
    max_memory: int | None,
    in_halves: bool = False,
    ranks: Mapping[str, int] | None = None,
) -> SpareMemory:
    """What a run leaves of `max_memory`, or of the free memory, for block inputs and activations.

    batches:   those that this process runs.
    in_halves: whether gradients are taken in two halves.
    ranks:     up to which rank each layer's gradient is decomposed, which tells where an exact SVD is taken.

    Block inputs come first. Activations are kept only where `max_memory` is given.
    """
    to_come = estimate_memory(opened, targets, batches, in_halves, ranks).to_come
    free = free_memory(opened.device)
    by_what_is_free = None if free is None else max(0, int(_SHARE * free) - to_come)
    host = free_memory(torch.device("cpu"))
    host_bytes = None if host is None else int(_SHARE * host)
    if max_memory is None:
        return SpareMemory(by_what_is_free, host_bytes, None)
    left = max_memory - used_memory(opened.device) - to_come
    if left < 0:
        sizes = map(describe_size, (max_memory - left, max_memory))
        logger.warning("About %s will be used, more than `max_memory` %s", *sizes)
    bytes_left = [size for size in (max(0, left), by_what_is_free) if size is not None]
    return SpareMemory(min(bytes_left), host_bytes, ActivationBudget(left))
