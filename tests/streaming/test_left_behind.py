"""What blocks hand on otherwise than by returning it: gradients pass where that can be, else it is refused by name."""

from __future__ import annotations

from collections import UserDict
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.causal import make_batches, reference_gradients, relative_error
from support.moe_models import make_moe
from support.own_modules import EXACT, MEMORY, Blocks, gradients_of, largest_error, make_inputs
from torch import nn

from loraone_init.errors import ModelError
from loraone_init.gradients.causal_lm import CausalLM
from loraone_init.gradients.objective import WholeModel
from loraone_init.gradients.stream import stream_gradients
from loraone_init.layers.targets import select_targets
from loraone_init.models.blocks import find_blocks
from loraone_init.streaming.stack import BlockStack
from loraone_init.weights.base import ResidentStore

FP32_INSIDE = 1e-5
"""transformers' norms compute in fp32."""

COLLECTED: ContextVar[list[torch.Tensor]] = ContextVar("collected")


@dataclass
class State:
    h: Any = None
    step: int = 0


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def compute(self, x):
        return torch.tanh(self.linear(x))


class Appends(Block):
    def forward(self, x, extra):
        y = self.compute(x)
        extra.append(y.mean())
        return y


class Writes(Block):
    def forward(self, x, extra):
        y = self.compute(x)
        extra[len(extra)] = y.mean()
        return y


class WritesInside(Block):
    def forward(self, x, extra):
        y = self.compute(x)
        extra["list"].append(y.mean())
        return y


class TakesOut(Block):
    def forward(self, x, extra):
        return self.compute(x) + (extra.pop() if extra else 0.0)


class LeavesAttribute(Block):
    def forward(self, x, extra):
        y = self.compute(x)
        self.aux = y.mean()
        return y


class AppendsToAttribute(Block):
    def __init__(self):
        super().__init__()
        self.losses = []

    def forward(self, x, extra):
        y = self.compute(x)
        self.losses.append(y.mean())
        return y


class LeavesBuffer(Block):
    def __init__(self):
        super().__init__()
        self.register_buffer("aux", torch.zeros(()), persistent=False)

    def forward(self, x, extra):
        y = self.compute(x)
        self.aux = y.mean()
        return y


class SetsContext(Block):
    def forward(self, x, extra):
        y = self.compute(x)
        COLLECTED.get().append(y.mean())
        return y


class ChangesState(Block):
    def forward(self, x, extra):
        extra.h = self.compute(x)
        return extra.h


class CountsInState(Block):
    def forward(self, x, extra):
        extra.step += 1
        return self.compute(x) * extra.step


class ReadsState(Block):
    def forward(self, x, extra):
        return self.compute(x) * extra.h


class ReturnsState(Block):
    def forward(self, x, extra):
        return State(self.compute(x.h if isinstance(x, State) else x))


class CachesTable(Block):
    """A constant that is made at the first call."""

    table = None

    def forward(self, x, extra):
        if self.table is None:
            self.table = torch.arange(5.0, dtype=x.dtype)
        return self.compute(x) + self.table


class Gives(Blocks):
    """Gives every block an `extra`, by position or name, and adds up what is in it."""

    def __init__(self, block, make_extra=list, named=False, read=None):
        torch.manual_seed(0)
        super().__init__([block() for _ in range(3)])
        self.make_extra, self.named, self.read = make_extra, named, read or (lambda model, extra: 0.0)

    def forward(self, x):
        COLLECTED.set([])
        extra = self.make_extra()
        for block in self.blocks:
            x = block(x, extra=extra) if self.named else block(x, extra)
        return (x.h if isinstance(x, State) else x) + self.read(self, extra)


def total(model, extra):
    return sum(extra.values() if hasattr(extra, "values") else extra)


def of_attributes(model, extra):
    return sum(sum(getattr(block, "losses", [getattr(block, "aux", 0.0)])) for block in model.blocks)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("named", [False, True], ids=["by position", "by name"])
@pytest.mark.parametrize(("block", "kind"), [(Appends, list), (Writes, dict), (Writes, UserDict)])
def test_what_a_block_puts_into_a_list_or_dict_is_an_output(block, kind, named, memory):
    model = Gives(block, kind, named, total)
    assert largest_error(model, make_inputs(), memory=MEMORY[memory]) < EXACT


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("rows", [(3,), (3, 4)], ids=["one micro-batch", "two"])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Gives(WritesInside, lambda: {"list": []}, read=lambda m, e: sum(e["list"])), "changes a list or dict inside"),
        (Gives(TakesOut, lambda: [1.0]), "takes something out of its argument 1"),
        (Gives(LeavesAttribute, read=of_attributes), r"blocks\.0 leaves a tensor in aux|blocks\.2 leaves"),
        (Gives(AppendsToAttribute, read=of_attributes), r"blocks\.\d leaves a tensor in losses\[\d\]"),
        (Gives(LeavesBuffer, read=of_attributes), "leaves a tensor in the buffer aux"),
        (
            Gives(SetsContext, read=lambda m, e: sum(COLLECTED.get())),
            r"leaves a tensor in the context variable collected",
        ),
        (Gives(ChangesState, State), r"blocks\.0 changes an object that it is given: State \(1\)\.h"),
        (Gives(CountsInState, State), r"blocks\.0 changes an object that it is given: State \(1\)\.step"),
        (Gives(ReturnsState), r"a gradient would have to pass block blocks\.0 through an object: State \(1\)\.h"),
    ],
    ids=lambda value: type(value.blocks[0]).__name__ if isinstance(value, Gives) else "",
)
def test_what_is_left_elsewhere_is_refused(model, message, rows, memory):
    with pytest.raises(ModelError, match=message):
        gradients_of(model, make_inputs(rows=rows), memory=MEMORY[memory])


class GlueSetsState(Gives):
    """Puts the last hidden states where the next block finds them."""

    def forward(self, x):
        state = State(x)
        for block in self.blocks:
            x = block(x, state)
            state.h = x
        return x


class GlueSetsConstant(Gives):
    def forward(self, x):
        state = State()
        for number, block in enumerate(self.blocks):
            state.h = torch.full((), 1.0 + number, dtype=x.dtype)
            x = block(x, state)
        return x


@pytest.mark.parametrize("kind", [GlueSetsState, GlueSetsConstant])
def test_an_object_through_which_a_gradient_passes_or_that_the_glue_changes_is_refused(kind):
    with pytest.raises(ModelError, match=r"a gradient would have to pass|State \(1\)\.h of block blocks\.1 is changed"):
        gradients_of(kind(ReadsState), make_inputs())


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize(
    "model", [Gives(CachesTable), Gives(ReadsState, lambda: State(torch.tensor(2.0).double()))], ids=["table", "object"]
)
def test_constants_are_no_matter(model, memory):
    assert largest_error(model, make_inputs(), memory=MEMORY[memory]) < EXACT


# What transformers collects of its blocks while they run.


def moe_gradients(objective, **flags):
    model, batches = make_moe("mixtral").requires_grad_(False), make_batches()
    model.config._attn_implementation = "eager"
    for flag, value in flags.items():
        setattr(model.config, flag, value)
    targets = select_targets(model, ("q_proj", "o_proj"))
    stack = BlockStack(model, find_blocks(model), ResidentStore())
    _, gradients = stream_gradients(stack, targets, objective(model), batches)
    return {gradient.name: gradient.G for gradient in gradients}


def test_what_our_objectives_do_not_read_is_not_collected():
    plain, collecting = (
        moe_gradients(lambda model: CausalLM(model, torch.device("cpu")), output_router_logits=flag, **attentions)
        for flag, attentions in ((False, {}), (True, {"output_attentions": True}))
    )
    assert all(torch.equal(plain[name], collecting[name]) for name in plain)


def test_a_loss_that_reads_what_transformers_collects_in_blocks_is_refused():
    """Routers' logits: without them the balancing loss would be left out without a word."""

    def loss(model, batch):
        return model(**batch).loss, 1

    with pytest.raises(ModelError, match=r"layers\.0 leaves a tensor in the context variable output_collector"):
        moe_gradients(lambda model: WholeModel(model, loss), output_router_logits=True)


def test_hidden_states_may_be_collected():
    """They are what blocks return."""

    def loss(model, batch):
        states = model(**batch, output_hidden_states=True).hidden_states
        return sum(h.cumsum(-1).mean() for h in states), 1

    found = moe_gradients(lambda model: WholeModel(model, loss))
    model = make_moe("mixtral").requires_grad_(False)
    truth = reference_gradients(
        model, select_targets(model, tuple(found)), lambda: sum(loss(model, b)[0] for b in make_batches()) / 3
    )
    assert max(relative_error(found[name], truth[name]) for name in truth) < FP32_INSIDE
