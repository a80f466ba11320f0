"""Which schedule memory allows, and how much of it block inputs may take."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

import torch
from torch import nn

from ..config import AUTO, Auto, Schedule
from ..errors import ConfigError
from ..machine import describe_size, free_memory, used_memory
from ..models.opening import OpenModel
from .estimate import Memory, estimate_memory

logger = logging.getLogger(__name__)

_SHARE = 0.9  # of free memory that is counted on, since what a run needs is an estimate
_NOT_WORTH_A_FILE = 16 * 2**20


@dataclass(frozen=True)
class Plan:
    """How gradients are taken, and where what passes between blocks is kept.

    why:                      the schedule was chosen, as told to the user.
    needs:                    the memory that it is estimated to take.
    device_bytes, host_bytes: for the inputs of blocks, on the device and in host memory (see `streaming.keeping`);
                              None sets no limit. Row by row too: a run that runs out of memory goes on by blocks.
    most_tokens:              of a micro-batch that goes through the whole model at once; None sets no limit.
    """

    schedule: Schedule
    why: str
    needs: Memory
    device_bytes: int | None
    host_bytes: int | None
    most_tokens: int | None = None


def check_schedule(schedule: str) -> None:
    if schedule not in (AUTO, *get_args(Schedule)):
        raise ConfigError(f"schedule must be one of {', '.join((AUTO, *get_args(Schedule)))}, got {schedule!r}")


def choose_schedule(
    asked: Schedule | Auto,
    opened: OpenModel,
    targets: Mapping[str, nn.Module],
    batches: Sequence[Any],
    max_memory: int | None,
    in_halves: bool = False,
    ranks: Mapping[str, int] | None = None,
) -> Plan:
    """The schedule asked for; for "auto" the fastest that fits, which is row by row where that does.

    batches:    those that this process runs.
    max_memory: bytes of the device that may be used; None: what is free.
    in_halves:  whether gradients are taken in two halves.
    ranks:      up to which rank each layer's gradient is decomposed, which tells where an exact SVD is taken.

    Raises ConfigError where the model cannot be run as asked for.
    """
    check_schedule(asked)
    room = _room(opened, max_memory)
    needs = estimate_memory(opened, targets, batches, in_halves, ranks)
    device_bytes, host_bytes = _kept_where(opened, needs, room, max_memory)
    by_blocks = partial(Plan, "blocks", needs=needs, device_bytes=device_bytes, host_bytes=host_bytes)
    obstacle = _obstacle(opened, batches, asked)
    if asked == "blocks" or obstacle:
        return _told(by_blocks(why=obstacle or "as asked for"), opened, max_memory)
    estimate = partial(estimate_memory, opened, targets, batches, in_halves, ranks, "rows")
    needs = estimate()
    most_tokens = None
    if room is not None and needs.to_come > room:  # smaller micro-batches need less
        most_tokens = _tokens_that_fit(needs, estimate(most_tokens=0), batches, room)
        needs = estimate(most_tokens=most_tokens)
    by_rows = partial(replace, by_blocks(why=""), schedule="rows", needs=needs, most_tokens=most_tokens)
    if asked == "rows" or not opened.blocks:
        return _told(by_rows(why="as asked for" if opened.blocks else "no blocks are known"), opened, max_memory)
    why = f"{describe_size(needs.to_come)} for all weights, sums and a micro-batch"
    if room is None:
        return by_rows(why=why)
    if needs.to_come <= room:
        return by_rows(why=f"{why} fit in the {describe_size(room)} left")
    return _told(by_blocks(why=f"{why} do not fit in the {describe_size(room)} left"), opened, max_memory)


def _obstacle(opened: OpenModel, batches: Sequence[Any], asked: Schedule | Auto) -> str | None:
    """Why the model has to be run block by block; None: it may be run as a whole. Raises as `choose_schedule` does."""
    if asked == "blocks" and not opened.blocks:
        raise ConfigError('schedule="blocks" needs a list of blocks, and none can be told; name it with `block_path`')
    if opened.device.type != "cpu" and opened.placement != "device":
        obstacle = f"weights come to {opened.device} block by block (placement {opened.placement})"
        if asked == "rows":
            raise ConfigError(f'schedule="rows" needs all weights in place, but {obstacle}')
        return obstacle
    known = all(isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), torch.Tensor) for batch in batches)
    if asked == AUTO and opened.blocks and opened.device.type == "cpu" and not known:
        return "what the whole model computes for these batches is unknown"
    return None


def _tokens_that_fit(all_tokens: Memory, none: Memory, batches: Sequence[Any], room: int) -> int | None:
    """How many tokens the largest micro-batch may have, but no fewer than the longest row has.

    all_tokens, none: what is needed for the micro-batches as they are, and for empty ones.
    """
    given = [batch.get("input_ids") for batch in batches if isinstance(batch, Mapping)]
    read = [ids for ids in given if isinstance(ids, torch.Tensor)]
    largest = max((ids.numel() for ids in read), default=0)
    longest = max((ids.shape[-1] for ids in read), default=0)
    share = (room - none.to_come) / max(1, all_tokens.to_come - none.to_come)
    return max(longest, int(share * largest)) or None


def agreed(own: Plan, plans: Sequence[Plan]) -> Plan:
    """What all processes do: row by row where each of them would. plans: of all processes; own: this one's."""
    if own.schedule == "rows" and any(plan.schedule == "blocks" for plan in plans):
        return replace(own, schedule="blocks", why="another process has too little memory for all weights")
    return own


def _room(opened: OpenModel, max_memory: int | None) -> int | None:
    """Bytes that the device has left for a run, when the model has been opened; None where that is unknown."""
    free = free_memory(opened.device)
    rooms = [] if free is None else [int(_SHARE * free)]
    if max_memory is not None:
        rooms.append(max(0, max_memory - used_memory(opened.device)))
    return min(rooms, default=None)


def _kept_where(
    opened: OpenModel, needs: Memory, room: int | None, max_memory: int | None
) -> tuple[int | None, int | None]:
    """The bytes of block inputs on the device and in host memory, as in `Plan`.

    On the CPU a file takes them, of which the system's file cache keeps what memory allows; with `max_memory`, what is
    left of that comes first.
    """
    left = None if room is None else max(0, room - needs.to_come)
    if max_memory is None and opened.device.type == "cpu":
        left = _NOT_WORTH_A_FILE if left is None else min(left, _NOT_WORTH_A_FILE)
    host = free_memory(torch.device("cpu"))
    return left, None if host is None else int(_SHARE * host)


def _told(plan: Plan, opened: OpenModel, max_memory: int | None) -> Plan:
    """The plan; a warning is logged where it needs more than may be used."""
    used = used_memory(opened.device) + plan.needs.to_come
    if max_memory is not None and used > max_memory:
        logger.warning("About %s will be used, more than `max_memory` %s", *map(describe_size, (used, max_memory)))
    return plan
