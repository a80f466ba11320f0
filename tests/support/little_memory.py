"""A stack of blocks that runs out of memory."""

from __future__ import annotations

import torch
from torch import nn

from loraone_init.models.blocks import find_blocks
from loraone_init.streaming.stack import BlockStack
from loraone_init.weights.base import ResidentStore


class LittleMemory(BlockStack):
    """Runs out of memory in some blocks with more than `most` rows; `backward_only`: not in the forward."""

    def __init__(self, model: nn.Module, most: int, blocks: tuple[int, ...] = (0, 1, 2), backward_only: bool = False):
        super().__init__(model, find_blocks(model), ResidentStore())
        self._limit = most, blocks, backward_only
        self.failures = 0

    def run(self, block, args, kwargs):
        most, blocks, backward_only = self._limit
        if block in blocks and len(args[0]) > most and (torch.is_grad_enabled() or not backward_only):
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().run(block, args, kwargs)
