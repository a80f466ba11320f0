"""Micro-batches that turn out not to fit in memory are halved, and the pass begins anew."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from ..data.pieces import halves_below, num_rows, num_tokens
from ..errors import ResourceError
from ..layers.sizes import routed_share, working_bytes
from ..machine import describe_size, free_memory
from ..streaming.stack import BlockStack
from ..streaming.too_large import TooLargeError
from .losses import RowLosses

logger = logging.getLogger(__name__)

T = TypeVar("T")


class MicroBatches:
    """A sample's batches, and the parts they are run in: themselves, until one is too large."""

    def __init__(self, batches: Sequence[Any], stack: BlockStack) -> None:
        self._stack = stack
        self.of: list[int] = list(range(len(batches)))  # which batch each part is of
        self.parts: list[Any] = list(batches)
        self._split()

    def attempt(self, run: Callable[[list[Any]], T]) -> T:
        """run(parts), begun anew with smaller parts as often as memory does not suffice.

        Raises ResourceError where a single row does not fit.
        """
        while True:
            try:
                return run(self.parts)
            except TooLargeError as error:
                index, block = error.index, error.block
            self.halve(index, block)  # out here, the error and all that its frames hold is gone

    def halve(self, index: int, block: int | None) -> None:
        """Halve that part, and all with as many tokens. Raises ResourceError where it has not several rows."""
        part, device = self.parts[index], next(self._stack.model.parameters()).device
        if device.type == "cuda":
            gc.collect()  # what failed may be held by cycles of frames and errors
            torch.cuda.empty_cache()
        if (num_rows(part) or 0) < 2:
            raise self._cannot_fit(part, block, device)
        if self._stack.keeper.too_many_tokens is None:
            rows, tokens = part["input_ids"].shape
            logger.warning(
                "Out of memory with %d rows of %d tokens%s: micro-batches of that size are halved, and the pass begins"
                " anew; the adapter equals that of a run without this to 1e-5",
                *(rows, tokens, "" if block is None else f" in {self._stack.names[block]}"),
            )
        self._stack.keeper.too_many_tokens = num_tokens(part)
        self._split()

    def merge(self, losses: Sequence[RowLosses]) -> list[RowLosses]:
        """Of the parts' losses, those of the batches, rows in their order."""
        merged: dict[int, list[RowLosses]] = {}
        for batch, part in zip(self.of, losses, strict=True):
            merged.setdefault(batch, []).append(part)
        return [
            parts[0]
            if len(parts) == 1
            else RowLosses(torch.cat([part.sums for part in parts]), torch.cat([part.counts for part in parts]))
            for parts in merged.values()
        ]

    def _split(self) -> None:
        """Halve what has too many tokens, until it has not or is one row."""
        limit = self._stack.keeper.too_many_tokens
        if limit is None:
            return
        pairs = [
            (batch, half) for batch, part in zip(self.of, self.parts, strict=True) for half in halves_below(part, limit)
        ]
        self.of, self.parts = [batch for batch, _ in pairs], [part for _, part in pairs]

    def _cannot_fit(self, part: Any, block: int | None, device: torch.device) -> ResourceError:
        free = free_memory(device)
        left = "" if free is None else f", {describe_size(free)} are free on {device}"
        if not num_rows(part):
            return ResourceError(f"out of memory: a batch does not fit, and cannot be halved{left}; give smaller ones")
        tokens = num_tokens(part)
        if block is None:
            what = f"the model outside of its blocks does not fit with one row of {tokens} tokens"
        else:
            needed = describe_size(working_bytes(self._stack.module(block), tokens, routed_share(self._stack.model)))
            what = f"{self._stack.names[block]} needs about {needed} beside its weights for one row of {tokens} tokens"
        return ResourceError(f"out of memory: {what}{left}; lower `max_length`, or close other programs")
