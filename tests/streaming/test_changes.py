"""What is changed behind the back of the streaming is noticed: refused by name, never silently wrong."""

from __future__ import annotations

import pytest
import torch
from support.own_modules import EXACT, MEMORY, Blocks, gradients_of, largest_error, make_inputs
from torch import nn

from loraone_init.errors import ModelError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x):
        return torch.tanh(self.linear(x * 1.0))  # the layer's input is the block's own: no hook of a layer sees x


class Plain(Block):
    """Its own backward needs nothing but weights."""

    def forward(self, x):
        return self.linear(x * 1.0)


def make(kind: type[Blocks], block: type[nn.Module] = Block) -> Blocks:
    torch.manual_seed(0)
    return kind([block() for _ in range(3)])


class AddsInPlace(Blocks):
    """A residual stream in one place, as in `h += block(h)`."""

    def forward(self, x):
        h = x * 1.0
        for block in self.blocks:
            h += block(h)
        return h


class ScaledByInput(nn.Module):
    """Its gradient needs its input, which no layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x, scale):
        return self.linear(x) * scale


class ScaleIsChanged(Blocks):
    """One tensor that every block is given, counted up between them."""

    def forward(self, x):
        scale = torch.ones((), dtype=x.dtype)
        for block in self.blocks:
            x = block(x, scale)
            scale += 1.0
        return x


class SquashedInPlace(Blocks):
    """The glue works in place on what a block returned, and the block's own backward needs that."""

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            x.mul_(0.5)
        return x


@pytest.mark.parametrize(("kind", "block"), [(AddsInPlace, Block), (ScaleIsChanged, ScaledByInput)])
def test_an_input_that_is_changed_after_its_block_is_refused(kind, block):
    with pytest.raises(ModelError, match=r"an input of block blocks\.\d is changed in place after the block"):
        gradients_of(make(kind, block), make_inputs())


def test_an_input_that_was_copied_away_may_be_changed():
    assert largest_error(make(AddsInPlace), make_inputs(), memory=MEMORY["on disk"]) < EXACT


@pytest.mark.parametrize("memory", MEMORY)
def test_an_output_that_nobody_needs_may_be_changed(memory):
    assert largest_error(make(SquashedInPlace, Plain), make_inputs(), memory=MEMORY[memory]) < EXACT


def test_an_output_that_its_backward_needs_may_not_be_changed_row_by_row():
    """Autograd's own check refuses the model as well; by blocks, they are computed again."""
    with pytest.raises(ModelError, match="the model changes in place what its backward needs"):
        gradients_of(make(SquashedInPlace), make_inputs(), whole=True)


class Workspace(nn.Module):
    """Returns a buffer that the next micro-batch's call fills anew."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.register_buffer("room", torch.zeros(4, 5), persistent=False)

    def forward(self, x):
        y = self.linear(x)
        return self.room[: len(x)].copy_(y) if not torch.is_grad_enabled() else y


class Chain(Blocks):
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_an_output_that_the_next_call_overwrites_is_refused():
    with pytest.raises(ModelError, match="changed in place"):
        gradients_of(make(Chain, Workspace), make_inputs())
