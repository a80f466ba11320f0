"""A layer used in several places is taken when its last use is over; one that is never called is no zero."""

from __future__ import annotations

import pytest
import torch
from support.own_modules import EXACT, MEMORY, Blocks, gradients_of, largest_error, make_inputs
from torch import nn

from loraone_init import InitConfig, initialize
from loraone_init.errors import ModelError


class Block(nn.Module):
    def __init__(self, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.own = nn.Linear(5, 5)
        self.shared = shared or nn.Identity()

    def forward(self, x):
        return torch.tanh(self.own(x)) + torch.tanh(self.shared(x))


def make(kind: type[Blocks]) -> Blocks:
    torch.manual_seed(0)
    shared = nn.Linear(5, 5)
    return kind([Block(shared) for _ in range(3)])


class LastToFirst(Blocks):
    def forward(self, x):
        for block in reversed(self.blocks):
            x = block(x)
        return x


class GlueFirst(Blocks):
    """The glue uses a block's layer before any block is called."""

    def forward(self, x):
        x = torch.tanh(self.blocks[2].own(x))
        for block in self.blocks:
            x = block(x)
        return x


class GlueBetween(Blocks):
    def forward(self, x):
        for block in self.blocks:
            x = block(torch.tanh(self.blocks[1].own(x)))
        return x


class GlueLast(Blocks):
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.blocks[0].own(x)


class NamedOutside(Blocks):
    """The shared layer's first name is not in a block, and only the last block in the list has it."""

    def __init__(self, blocks):
        super().__init__([])
        self.first = blocks[0].shared
        self.more = nn.ModuleList([Block(), Block(), blocks[2]])
        del self.blocks
        self.blocks = self.more
        del self.more

    def forward(self, x):
        for block in reversed(self.blocks):
            x = block(x)
        return x


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("kind", [LastToFirst, GlueFirst, GlueBetween, GlueLast, NamedOutside])
def test_gradients_of_layers_that_are_used_in_several_places(kind, memory):
    assert largest_error(make(kind), make_inputs(), memory=MEMORY[memory]) < EXACT


def test_a_block_that_calls_another_block_is_refused():
    class Nested(Blocks):
        def __init__(self) -> None:
            inner = Block()
            outer = nn.Sequential(nn.Linear(5, 5), inner)
            super().__init__([outer, inner])

        def forward(self, x):
            return self.blocks[0](x)

    with pytest.raises(ModelError, match="a block calls another block"):
        gradients_of(Nested(), make_inputs())


# Layers that are never called.


class Attention(nn.Module):
    """PyTorch's own, which reads the weight of its `out_proj`, a linear layer, and never calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.mix = nn.Linear(6, 6)

    def forward(self, x):
        x = self.mix(x)
        return x + self.attention(x, x, x)[0]


class Chain(Blocks):
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def squares(model, batch):
    return (model(batch) ** 2).sum(), batch.numel()


@pytest.mark.parametrize("block_path", ["blocks", None])
def test_a_layer_whose_weight_is_read_without_a_call_is_left_out_or_refused(block_path, caplog):
    torch.manual_seed(0)
    model, batches = Chain([Attention(), Attention()]), [torch.randn(2, 3, 6) for _ in range(2)]
    named = InitConfig(rank=2, block_path=block_path, target_modules=("mix", "out_proj"))
    with pytest.raises(
        ModelError,
        match=r'layer blocks\.0\.attention\.out_proj and 1 others are never called.*`exclude_modules="out_proj"`',
    ):
        initialize(model, batches, named, loss=squares)
    found = initialize(model, batches, InitConfig(rank=2, block_path=block_path, gamma=128.0), loss=squares)
    assert "2 of 4 layers are left out, such as blocks.0.attention.out_proj: they are never called" in caplog.text
    config = InitConfig(rank=2, block_path=block_path, exclude_modules=("out_proj",), gamma=128.0)
    adapter = initialize(model, batches, config, loss=squares)
    assert {layer.init for layer in adapter.layers.values()} == {"spectral"}
    assert found.layers == adapter.layers
    assert all(torch.equal(found.pairs[name].B, pair.B) for name, pair in adapter.pairs.items())


class Spare(nn.Module):
    """Has a layer that it does not use, and shares its weight with a table that it does."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.unused, self.tied = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.table = nn.Embedding(6, 6)
        self.table.weight = self.tied.weight

    def forward(self, x):
        return self.mix(x) + self.table(torch.arange(6)[: x.shape[-2]])


def test_layers_that_nothing_reads_get_the_standard_start():
    torch.manual_seed(0)
    batches = [torch.randn(2, 3, 6) for _ in range(2)]
    adapter = initialize(
        Chain([Spare(), Spare()]), batches, InitConfig(rank=2, block_path="blocks", gamma=128.0), loss=squares
    )
    unused = {name for name, layer in adapter.layers.items() if layer.init == "standard"}
    assert unused == {f"blocks.{i}.{name}" for i in (0, 1) for name in ("unused", "tied")}
