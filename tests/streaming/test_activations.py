"""Activations that are kept change nothing but time and memory."""

from __future__ import annotations

import pytest
import torch
from support.causal import CAUSAL_CONFIGS, ChangesItsInput, make_batches, make_model
from torch import nn

from loraone_init import InitConfig, initialize, open_model
from loraone_init.errors import ModelError
from loraone_init.gradients.causal_lm import CausalLM
from loraone_init.gradients.objective import WholeModel
from loraone_init.gradients.stream import stream_gradients
from loraone_init.layers.targets import select_targets
from loraone_init.models.blocks import find_blocks
from loraone_init.streaming.activations import ActivationBudget, HeldBytes
from loraone_init.streaming.stack import BlockStack
from loraone_init.weights.base import ResidentStore

CPU = torch.device("cpu")
PLENTY = 2**40


class CountingStack(BlockStack):
    """Counts how often a block's own forward runs."""

    runs = 0

    def run(self, block, args, kwargs):
        self.runs += 1
        return super().run(block, args, kwargs)


def gradients_within(model, batches, limit):
    """Gradients with activations kept within `limit` bytes (None keeps none), and how often blocks ran."""
    model.requires_grad_(False)
    stack = CountingStack(model, find_blocks(model), ResidentStore())
    budget = None if limit is None else ActivationBudget(limit)
    targets = select_targets(model, "all-linear")
    _, gradients = stream_gradients(stack, targets, CausalLM(model, CPU), batches, budget=budget)
    return {gradient.name: gradient.G for gradient in gradients}, stack.runs


@pytest.mark.parametrize("name", CAUSAL_CONFIGS)
def test_same_gradients_bit_for_bit_and_no_block_runs_twice(name):
    batches, calls = make_batches(), make_model(name).config.num_hidden_layers * 3
    again, runs = gradients_within(make_model(name), batches, None)
    kept, runs_kept = gradients_within(make_model(name), batches, PLENTY)
    assert (runs, runs_kept) == (2 * calls, calls)
    assert all(torch.equal(kept[layer], again[layer]) for layer in again)


def test_what_does_not_fit_is_computed_again():
    batches = make_batches((9,) * 6)
    truth, runs = gradients_within(make_model("llama"), batches, None)
    some, runs_some = gradients_within(make_model("llama"), batches, 500_000)
    none, runs_none = gradients_within(make_model("llama"), batches, 10_000)
    assert runs / 2 < runs_some < runs
    assert runs_none == runs
    assert all(torch.equal(some[layer], truth[layer]) and torch.equal(none[layer], truth[layer]) for layer in truth)


def test_weights_on_disk_are_not_held_by_graphs(tmp_path):
    """They are dropped between forward and backward, and the adapter is the same."""
    make_model("llama", torch.float32).save_pretrained(tmp_path)
    plain, kept = (
        initialize(open_model(str(tmp_path)), make_batches(), InitConfig(rank=4, gamma=128.0), max_memory=memory)
        for memory in (None, PLENTY)
    )
    assert plain.metadata() == kept.metadata()
    assert all(torch.equal(plain.pairs[name].B, kept.pairs[name].B) for name in plain.pairs)


def test_weights_do_not_count():
    block, held = nn.Linear(300, 200).requires_grad_(False), HeldBytes()
    x = torch.randn(4, 300, requires_grad=True)
    with held.counted(block, "block"):
        y = block(x).relu()
    assert held.total == 4 * 200 * 4  # what relu keeps
    y.sum().backward()
    assert torch.equal(x.grad, (y > 0).float() @ block.weight)


def test_graphs_take_from_the_budget_until_it_is_used_up():
    budget = ActivationBudget(100)
    budget.expect(3, num_blocks=2, num_batches=3)
    budget.expect(4, num_blocks=2, num_batches=3)
    budget.expect(3, num_blocks=2, num_batches=3)
    assert budget.left == 100 - 2 * (3 + 4 + 3)
    assert budget.allows(1)  # nothing is known yet
    assert budget.take(50, input_bytes=5)
    assert (budget.left, budget.allows(3), budget.allows(4)) == (30, True, False)
    assert not budget.take(31, input_bytes=3)
    assert budget.left == 30


def test_a_block_that_changes_its_input_is_refused():
    model = ChangesItsInput().requires_grad_(False)
    stack = BlockStack(model, find_blocks(model, "blocks"), ResidentStore())
    objective = WholeModel(model, lambda model, batch: (model(batch).sum(), 1))
    targets, budget = select_targets(model, "all-linear"), ActivationBudget(PLENTY)
    with pytest.raises(ModelError, match=r"blocks\.1 changes its inputs in place"):
        stream_gradients(stack, targets, objective, [torch.ones(2, 3)], budget=budget)
