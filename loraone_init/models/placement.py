"""Which of the stores a model's weights go to, by what memory is free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from ..errors import ConfigError
from ..layers.sizes import routed_share, working_bytes
from ..machine import describe_size, free_memory
from ..weights.base import tensors_inside

Placement = Literal["auto", "device", "host", "disk"]
Place = Literal["device", "host", "disk"]


_TOKENS = 8192  # of a micro-batch; the sample is not known yet when a model is opened
_HOST_SHARE = 0.8  # of the free host memory that weights may take: block inputs may need the rest


@dataclass(frozen=True)
class Needs:
    """Bytes.

    weights: of the whole model.
    blocks:  of all blocks together.
    block:   of the largest one.
    working: its fp32 gradients, and what it computes for a micro-batch of 8,192 tokens.
    """

    weights: int
    blocks: int
    block: int
    working: int

    @property
    def streamed(self) -> int:
        """On the device where blocks come and go: two of them, and what belongs to none."""
        return self.weights - self.blocks + 2 * self.block + self.working


@dataclass(frozen=True)
class Choice:
    """A place, and why, as told to the user."""

    place: Place
    why: str


def check_placement(placement: str) -> None:
    if placement not in get_args(Placement):
        raise ConfigError(f"placement must be one of {', '.join(get_args(Placement))}, got {placement!r}")


def choose(
    asked: Placement,
    model: nn.Module,
    blocks: Sequence[str],
    device: torch.device,
    cap: int | None,
    obstacle: str | None,
) -> Choice:
    """Where the weights go.

    cap:      bytes of the device that may be used; None: what is free.
    obstacle: why blocks cannot be read from the checkpoint one by one; None: they can.
    """
    free = free_memory(device)
    room = min(size for size in (cap, free, 2**62) if size is not None)
    host = free_memory(torch.device("cpu"))
    return decide(asked, _needs(model, blocks), device, room, 2**62 if host is None else host, obstacle)


def decide(asked: Placement, needs: Needs, device: torch.device, room: int, host: int, obstacle: str | None) -> Choice:
    """The rule of `choose`. room, host: bytes that may be used on the device and in host memory."""
    if asked == "disk" and obstacle:
        return Choice("host", f"not disk: {obstacle}, so blocks cannot be read one by one")
    if asked != "auto":
        return Choice(asked, "as asked for")
    weights = f"{describe_size(needs.weights)} of weights"
    if device.type == "cpu":
        if obstacle is None:
            return Choice("disk", f"{weights}; on a CPU the system's file cache keeps of them what memory allows")
        return Choice("device", f"{weights}; {obstacle}, so blocks cannot be read one by one")
    if needs.weights + needs.working <= room:
        return Choice("device", f"{weights} fit in the {describe_size(room)} that may be used on {device}")
    beside = f"{weights} do not fit beside a micro-batch in the {describe_size(room)} that may be used on {device}"
    if needs.blocks <= _HOST_SHARE * host or obstacle is not None:
        return Choice("host", f"{beside}; {describe_size(host)} of host memory are free")
    return Choice("disk", f"{beside}, nor in the {describe_size(host)} of host memory that are free")


def _needs(model: nn.Module, blocks: Sequence[str]) -> Needs:
    """The needs of a model, by its shapes: it may have no storage."""
    sizes = [sum(tensor.nbytes for tensor in tensors_inside(model, block).values()) for block in blocks]
    everything = [*model.parameters(), *model.buffers()]
    routed = routed_share(model)
    return Needs(
        weights=sum(tensor.nbytes for tensor in everything),
        blocks=sum(sizes),
        block=max(sizes, default=0),
        working=max((working_bytes(model.get_submodule(block), _TOKENS, routed) for block in blocks), default=0),
    )
