"""Micro-batches that turn out not to fit in memory are halved, and the pass begins anew."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ..data.pieces import Piece, halve_until_below
from ..errors import ResourceError
from ..layers.sizes import routed_share, working_bytes
from ..machine import describe_size, free_memory, release_memory
from ..streaming.stack import BlockStack
from ..streaming.too_large import TooLargeError

logger = logging.getLogger(__name__)

T = TypeVar("T")


class MicroBatches:
    """The pieces of a sample as they are run: those that are given, until one of them is too large.

    What was too large is known to the stack's keeper, so that later passes halve such pieces at once.
    """

    def __init__(self, pieces: Sequence[Piece], stack: BlockStack) -> None:
        self._stack = stack
        self.pieces = list(pieces)
        self._halve_large_ones()

    def attempt(self, run: Callable[[], T]) -> T:
        """run(), begun anew with smaller pieces as often as memory does not suffice.

        Raises ResourceError where a single row does not fit.
        """
        while True:
            try:
                return run()
            except TooLargeError as error:
                index, block = error.index, error.block
            self.halve(index, block)  # out here, the error and all that its frames hold is gone

    def halve(self, index: int, block: int | None) -> None:
        """Halve the piece of this number, which did not fit, and all that have as many tokens.

        block: in which block it did not fit; None: outside of all. Raises ResourceError for a piece of a single row,
        and for a batch that cannot be divided.
        """
        piece, device = self.pieces[index], self._stack.device
        release_memory(device)
        if piece.num_rows < 2:
            raise self._cannot_fit(piece, block, device)
        if self._stack.keeper.too_many_tokens is None:
            logger.warning(
                "Out of memory with %d rows of %d tokens%s: micro-batches of that size are halved, and the pass begins"
                " anew; the adapter equals that of a run without this to 1e-5",
                piece.num_rows,
                piece.num_tokens // piece.num_rows,
                "" if block is None else f" in {self._stack.names[block]}",
            )
        self._stack.keeper.too_many_tokens = piece.num_tokens
        self._halve_large_ones()

    def _halve_large_ones(self) -> None:
        too_many, most = self._stack.keeper.too_many_tokens, self._stack.most_tokens
        limit = min((n for n in (too_many, None if most is None else most + 1) if n is not None), default=None)
        if limit is not None:
            self.pieces = [part for piece in self.pieces for part in halve_until_below(piece, limit)]

    def _cannot_fit(self, piece: Piece, block: int | None, device: torch.device) -> ResourceError:
        free = free_memory(device)
        left = "" if free is None else f", {describe_size(free)} are free on {device}"
        if piece.rows is None:
            return ResourceError(
                f"out of memory: a batch does not fit{left}, and is not halved, as its loss may not be the sum of its"
                " rows' losses; give smaller batches"
            )
        tokens = piece.num_tokens
        if self._stack.is_whole:
            return ResourceError(
                f"out of memory: the whole model does not fit with one row of {tokens} tokens{left}; use"
                ' `schedule="blocks"`, or lower `max_length`'
            )
        if block is None:
            what = f"the model outside of its blocks does not fit with one row of {tokens} tokens"
        else:
            needed = describe_size(working_bytes(self._stack.module(block), tokens, routed_share(self._stack.model)))
            what = f"{self._stack.names[block]} needs about {needed} beside its weights for one row of {tokens} tokens"
        return ResourceError(f"out of memory: {what}{left}; lower `max_length`, or close other programs")
