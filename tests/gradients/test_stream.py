"""Block streaming equals whole-model autograd, and streams."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from support.causal import (
    CAUSAL_CONFIGS,
    ChangesItsInput,
    make_batches,
    make_model,
    reference_gradients,
    reference_loss,
    relative_error,
)
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import T5Config, T5ForConditionalGeneration

from loraone_init.errors import DataError, ModelError
from loraone_init.gradients.causal_lm import CausalLM
from loraone_init.gradients.objective import WholeModel
from loraone_init.gradients.stream import stream_gradients, stream_losses
from loraone_init.layers.targets import select_targets
from loraone_init.models.blocks import find_blocks
from loraone_init.streaming.stack import BlockStack
from loraone_init.weights.base import ResidentStore

EXACT = 1e-10
"""fp64 on both sides; what is left is the order of summation."""

FP32_INSIDE = 1e-6
"""T5's layer norm and softmax compute in fp32."""

CPU = torch.device("cpu")


class CountingStore(ResidentStore):
    """Counts how often each block is loaded, and which are present together."""

    def __init__(self) -> None:
        self.loads: Counter[str] = Counter()
        self.present: set[str] = set()

    @contextmanager
    def loaded(self, block: str) -> Iterator[None]:
        self.loads[block] += 1
        self.present.add(block)
        assert len(self.present) == 1
        yield
        self.present.remove(block)


def causal_gradients(model, batches, target_modules="all-linear", store=None, whole=False):
    model.requires_grad_(False)
    targets = select_targets(model, target_modules)
    stack = BlockStack(model, find_blocks(model), store or ResidentStore())
    with stack.as_a_whole() if whole else nullcontext():
        losses, gradients = stream_gradients(stack, targets, CausalLM(model, CPU), batches)
        return targets, losses, list(gradients)


@pytest.mark.parametrize("name", CAUSAL_CONFIGS)
def test_equals_whole_model_autograd(name):
    model, batches = make_model(name), make_batches()
    targets, _, gradients = causal_gradients(model, batches)
    found = {gradient.name: gradient.G for gradient in gradients}
    truth = reference_gradients(model, targets, lambda: reference_loss(model, batches))
    assert {name: relative_error(found[name], truth[name]) < EXACT for name in targets} == dict.fromkeys(targets, True)
    _, _, row_by_row = causal_gradients(model, batches, whole=True)
    assert all(torch.equal(gradient.G, found[gradient.name]) for gradient in row_by_row)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_loss_is_the_mean_over_all_label_tokens(name):
    model, batches = make_model(name), make_batches()
    _, losses, _ = causal_gradients(model, batches)
    mean = sum(float(rows.sums.sum()) for rows in losses) / sum(float(rows.counts.sum()) for rows in losses)
    assert mean == pytest.approx(reference_loss(model, batches).item(), rel=EXACT)


def test_sum_by_row_matches_each_row_alone():
    model, batches = make_model("llama"), make_batches()
    _, losses, _ = causal_gradients(model, batches)
    for batch, rows in zip(batches, losses, strict=True):
        for row in range(2):
            alone = reference_loss(model, [{key: value[row : row + 1] for key, value in batch.items()}])
            assert float(rows.sums[row] / rows.counts[row]) == pytest.approx(alone.item(), rel=EXACT)


def test_output_embedding_can_be_a_target():
    model, batches = make_model("llama"), make_batches()
    targets, _, gradients = causal_gradients(model, batches, ("lm_head", "q_proj"))
    truth = reference_gradients(model, targets, lambda: reference_loss(model, batches))
    for gradient in gradients:
        assert relative_error(gradient.G, truth[gradient.name]) < EXACT


def test_head_chunks_do_not_change_the_gradient(monkeypatch):
    monkeypatch.setattr("loraone_init.gradients.causal_lm.MAX_LOGITS", 3 * 97)  # three tokens at a time
    model, batches = make_model("gemma3"), make_batches()
    targets, _, gradients = causal_gradients(model, batches)
    truth = reference_gradients(model, targets, lambda: reference_loss(model, batches))
    for gradient in gradients:
        assert relative_error(gradient.G, truth[gradient.name]) < EXACT


def test_two_stacks_with_shared_tensors():
    """T5: the encoder's output and the position biases go to several blocks."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "vocab_size": 97}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).double().eval()
    model.requires_grad_(False)
    inputs = [torch.randint(3, 97, (2, length)) for length in (7, 5)]
    labels = [torch.randint(3, 97, (2, length)) for length in (4, 6)]

    def loss(model, batch):
        logits = model(input_ids=batch[0], labels=batch[1], use_cache=False).logits
        return cross_entropy(logits.flatten(0, 1), batch[1].flatten(), reduction="sum"), batch[1].numel()

    batches = list(zip(inputs, labels, strict=True))
    targets = select_targets(model, "all-linear")
    store = CountingStore()
    stack = BlockStack(model, find_blocks(model), store)
    _, gradients = stream_gradients(stack, targets, WholeModel(model, loss), batches)
    found = {gradient.name: gradient.G for gradient in gradients}
    truth = reference_gradients(
        model, targets, lambda: sum(loss(model, batch)[0] for batch in batches) / sum(b[1].numel() for b in batches)
    )
    assert max(relative_error(found[name], truth[name]) for name in targets) < FP32_INSIDE
    assert set(store.loads.values()) == {2}
    assert len(store.loads) == 6


def test_module_without_blocks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double().requires_grad_(False)
    batches = [(torch.randn(4, 5).double(), torch.randn(4, 3).double()) for _ in range(2)]

    def loss(model, batch):
        return ((model(batch[0]) - batch[1]) ** 2).sum(), batch[1].numel()

    targets = select_targets(model, "all-linear")
    stack = BlockStack(model, [], ResidentStore())
    _, gradients = stream_gradients(stack, targets, WholeModel(model, loss), batches)
    truth = reference_gradients(model, targets, lambda: sum(loss(model, batch)[0] for batch in batches) / 24)
    for gradient in gradients:
        assert relative_error(gradient.G, truth[gradient.name]) < EXACT


def test_block_that_is_used_twice():
    """The gradient of a shared block comes out once, when its earliest use has been passed."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(6, 6), nn.Tanh())

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([block])

        def forward(self, x):
            return self.blocks[0](self.blocks[0](x))

    model = Shared().double().requires_grad_(False)
    x = torch.randn(4, 6).double()

    def loss(model, batch):
        return (model(batch) ** 2).sum(), 1

    targets = select_targets(model, "all-linear")
    stack = BlockStack(model, find_blocks(model, "blocks"), ResidentStore())
    _, gradients = stream_gradients(stack, targets, WholeModel(model, loss), [x])
    found = list(gradients)
    truth = reference_gradients(model, targets, lambda: loss(model, x)[0])
    assert [gradient.name for gradient in found] == ["blocks.0.0"]
    assert relative_error(found[0].G, truth["blocks.0.0"]) < EXACT


def test_each_block_is_loaded_twice_whatever_the_number_of_micro_batches():
    store = CountingStore()
    _, _, gradients = causal_gradients(make_model("llama"), make_batches((9, 12, 7, 5, 6)), store=store)
    list(gradients)
    assert store.loads == {f"model.layers.{index}": 2 for index in range(3)}


def test_gradients_of_one_block_are_alive_at_a_time():
    """As each gradient is taken, no gradient of another block has storage."""
    model = make_model("llama")
    targets = select_targets(model, "all-linear")
    stack = BlockStack(model, find_blocks(model), ResidentStore())
    model.requires_grad_(False)
    _, gradients = stream_gradients(stack, targets, CausalLM(model, CPU), make_batches())
    [sums] = gradients.gi_frame.f_locals["self"]._collector._sums
    for gradient in gradients:
        block = gradient.name.rsplit(".", 2)[0]
        assert all(name.startswith(block) for name in sums)


def test_blocks_below_the_lowest_target_are_not_backpropagated():
    store = CountingStore()
    _, _, gradients = causal_gradients(make_model("llama"), make_batches(), r".*layers\.[12]\..*q_proj", store=store)
    list(gradients)
    assert store.loads == {"model.layers.0": 1, "model.layers.1": 2, "model.layers.2": 2}


def test_forward_without_gradients_gives_the_same_loss():
    model, batches = make_model("llama"), make_batches()
    _, losses, _ = causal_gradients(model, batches)
    stack = BlockStack(model, find_blocks(model), ResidentStore())
    again = stream_losses(stack, CausalLM(model, CPU), batches)
    assert [rows.sums.tolist() for rows in again] == [rows.sums.tolist() for rows in losses]


def test_the_model_is_as_it_was_afterwards():
    model, batches = make_model("llama"), make_batches()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    _, _, gradients = causal_gradients(model, batches)
    list(gradients)
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert {name: set(dict(module.__dict__)) for name, module in model.named_modules()} == {
        name: set(content) for name, content in before.items()
    }


def test_no_label_at_all_is_an_error():
    batches = make_batches()
    for batch in batches:
        batch["labels"].fill_(-100)
    with pytest.raises(DataError, match="no trainable tokens"):
        causal_gradients(make_model("llama"), batches)


def test_an_error_in_a_block_ends_all_threads():
    model = make_model("llama")
    model.model.layers[1].mlp.forward = lambda *args: 1 / 0
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        causal_gradients(model, make_batches())
    assert threading.active_count() == before


def test_a_block_that_changes_its_input_is_refused():
    model = ChangesItsInput().requires_grad_(False)
    stack = BlockStack(model, find_blocks(model, "blocks"), ResidentStore())
    objective = WholeModel(model, lambda model, batch: (model(batch).sum(), 1))
    with pytest.raises(ModelError, match=r"blocks\.1 changes its inputs in place"):
        stream_gradients(stack, select_targets(model, "all-linear"), objective, [torch.ones(2, 3)])


def test_micro_batches_that_take_different_ways_are_refused():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

        def forward(self, x):
            return self.blocks[int(x[0, 0])](x)

    model = Model().requires_grad_(False)
    stack = BlockStack(model, find_blocks(model, "blocks"), ResidentStore())
    objective = WholeModel(model, lambda model, batch: (model(batch).sum(), 1))
    with pytest.raises(ModelError, match="different ways"):
        stream_gradients(stack, select_targets(model, "all-linear"), objective, [torch.zeros(1, 3), torch.ones(1, 3)])


def test_a_layer_input_that_is_changed_afterwards_is_refused():
    """dYᵀX needs the X that the layer saw; weights are frozen, so autograd itself would not notice."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            h = self.a(x)
            y = self.b(h)
            h += y
            return h

    model = Model().requires_grad_(False)
    stack = BlockStack(model, [], ResidentStore())
    objective = WholeModel(model, lambda model, batch: (model(batch).sum(), 1))
    with pytest.raises(ModelError, match="input of layer b is changed in place"):
        stream_gradients(stack, select_targets(model, "all-linear"), objective, [torch.ones(2, 3)])
