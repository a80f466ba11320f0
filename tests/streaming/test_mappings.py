"""Blocks that hand tensors on in a mapping: the gradient goes back to the block that wrote."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
from support.causal import reference_gradients, relative_error
from torch import nn

from loraone_init import InitConfig, initialize
from loraone_init.gradients.objective import WholeModel
from loraone_init.gradients.stream import stream_gradients
from loraone_init.layers.targets import select_targets
from loraone_init.models.blocks import find_blocks
from loraone_init.streaming.mappings import run_with_mappings
from loraone_init.streaming.stack import BlockStack
from loraone_init.weights.base import ResidentStore

EXACT = 1e-10


class Block(nn.Module):
    """Writes its keys where there are none or at every second block, and adds those that are there."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index, self.mix, self.keys = index, nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x, shared):
        if self.index % 2 == 0:
            shared["keys"] = self.keys(x)
        return torch.tanh(self.mix(x)) * shared["keys"]


class Model(nn.Module):
    def __init__(self, mapping: type) -> None:
        super().__init__()
        self.mapping = mapping
        self.blocks = nn.ModuleList(Block(index) for index in range(4))

    def forward(self, x):
        shared = self.mapping()
        for block in self.blocks:
            x = block(x, shared=shared)
        return x + shared["keys"]


def loss(model, batch):
    return (model(batch) ** 2).sum(), batch.numel()


@pytest.mark.parametrize("mapping", [dict, UserDict])
def test_what_a_block_writes_is_an_output(mapping):
    torch.manual_seed(0)
    model, batches = Model(mapping).double().requires_grad_(False), [torch.randn(n, 5).double() for n in (3, 4)]
    targets = select_targets(model, (*(f"{i}.mix" for i in range(4)), "0.keys", "2.keys"))
    stack = BlockStack(model, find_blocks(model, "blocks"), ResidentStore())
    _, gradients = stream_gradients(stack, targets, WholeModel(model, loss), batches)
    found = {gradient.name: gradient.G for gradient in gradients}
    truth = reference_gradients(model, targets, lambda: sum(loss(model, batch)[0] for batch in batches) / 35)
    assert max(relative_error(found[name], truth[name]) for name in targets) < EXACT


def test_layers_that_no_block_reads_from_get_the_standard_start():
    """The odd blocks' keys are never computed."""
    torch.manual_seed(0)
    adapter = initialize(
        Model(UserDict), [torch.randn(6, 5)], InitConfig(rank=2, block_path="blocks", gamma=128.0), loss=loss
    )
    unused = {name for name, layer in adapter.layers.items() if layer.init == "standard"}
    assert unused == {"blocks.1.keys", "blocks.3.keys"}


def test_mappings_that_are_given_are_not_written_to():
    given = {"old": 1, "same": 2}

    def forward(shared):
        shared["old"], shared["new"] = 3, 4
        return "answer"

    assert run_with_mappings(forward, (), {"shared": given}) == ("answer", {"shared": {"old": 3, "new": 4}})
    assert given == {"old": 1, "same": 2}
