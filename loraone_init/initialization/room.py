"""How much of the memory may be used for what, beside the weights and what a micro-batch needs."""

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

_SHARE = 0.9  # of free memory that is counted on; what is needed beside is an estimate


@dataclass(frozen=True)
class Room:
    """device_bytes, host_bytes: for what is kept between blocks; see `Keeper`. activations: None: none are kept."""

    device_bytes: int | None
    host_bytes: int | None
    activations: ActivationBudget | None


def find_room(
    opened: OpenModel,
    targets: Mapping[str, nn.Module],
    batches: Sequence[Any],
    max_memory: int | None,
    in_halves: bool = False,
    ranks: Mapping[str, int] | None = None,
) -> Room:
    """What is left of `max_memory`, or of the free memory, beside all else that a run needs on the device.

    Block inputs come first; activations are kept only where a limit is given.
    """
    to_come = estimate_memory(opened, targets, batches, in_halves, ranks).to_come
    free = free_memory(opened.device)
    by_what_is_free = None if free is None else max(0, int(_SHARE * free) - to_come)
    host = free_memory(torch.device("cpu"))
    host_bytes = None if host is None else int(_SHARE * host)
    if max_memory is None:
        return Room(by_what_is_free, host_bytes, None)
    left = max_memory - used_memory(opened.device) - to_come
    if left < 0:
        sizes = map(describe_size, (max_memory - left, max_memory))
        logger.warning("About %s will be used, more than --max-memory %s", *sizes)
    bytes_left = [size for size in (max(0, left), by_what_is_free) if size is not None]
    return Room(min(bytes_left), host_bytes, ActivationBudget(left))
