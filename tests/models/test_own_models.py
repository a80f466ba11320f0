"""Models and losses from Python: with blocks named and without, and in PEFT."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from support.causal import make_model, reference_gradients, relative_error
from torch import nn
from torch.nn.functional import cross_entropy

from loraone_init import InitConfig, initialize
from loraone_init.gradients.objective import WholeModel
from loraone_init.gradients.stream import stream_gradients
from loraone_init.layers.targets import select_targets
from loraone_init.models.opening import open_module
from loraone_init.streaming.stack import BlockStack

EXACT = 1e-10

FP32_INSIDE = 1e-6
"""Llama's norm computes in fp32, where the mean's 1/n before or after it rounds in another way."""

FP32 = 1e-5


class Mixer(nn.Module):
    """Neither of transformers nor a sequence: an embedding, blocks with two inputs, and two heads."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

        def forward(self, x, scale):
            return x + self.down(torch.tanh(self.up(x)) * scale)

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.scale = nn.Embedding(7, 12), nn.Linear(12, 20)
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))
        self.heads = nn.ModuleDict({"a": nn.Linear(12, 4), "b": nn.Linear(12, 2)})

    def forward(self, ids):
        x = self.embedding(ids)
        scale = self.scale(x)
        for block in self.blocks:
            x = block(x, scale)
        return self.heads["a"](x), self.heads["b"](x)


def mixer_loss(model, batch):
    ids, classes, numbers = batch
    a, b = model(ids)
    return cross_entropy(a, classes, reduction="sum") + ((b - numbers) ** 2).sum(), len(ids)


def make_batch(rows):
    return torch.randint(0, 7, (rows,)), torch.randint(0, 4, (rows,)), torch.randn(rows, 2).double()


@pytest.fixture
def mixer():
    torch.manual_seed(0)
    return Mixer().double(), [make_batch(rows) for rows in (5, 9)]


@pytest.mark.parametrize("block_path", ["blocks", None])
def test_equals_whole_model_autograd(mixer, block_path):
    model, batches = mixer[0].requires_grad_(False), mixer[1]
    opened, targets = open_module(model, block_path), select_targets(model, "all-linear")
    assert len(opened.blocks) == (3 if block_path else 0)
    _, gradients = stream_gradients(BlockStack.of(opened), targets, WholeModel(model, mixer_loss), batches)
    found = {gradient.name: gradient.G for gradient in gradients}
    truth = reference_gradients(model, targets, lambda: sum(mixer_loss(model, batch)[0] for batch in batches) / 14)
    assert len(found) == 9
    assert max(relative_error(found[name], truth[name]) for name in targets) < EXACT


def test_peft_computes_the_same(mixer, tmp_path):
    model, batches = mixer
    adapter = initialize(model, batches, InitConfig(rank=2, gamma=16.0, block_path="blocks"), loss=mixer_loss)
    adapter.save(tmp_path / "peft")
    peft = PeftModel.from_pretrained(model, tmp_path / "peft").eval()
    with torch.no_grad():
        losses = [mixer_loss(peft, batch)[0].item() / len(batch[0]) for batch in batches]
    assert min(abs(loss - adapter.loss.after) for loss in losses) < FP32  # one of the two was evaluated
    assert adapter.loss.after < adapter.loss.before


def test_transformers_model_with_a_cache_and_a_loss_of_ones_own():
    """No mask is given, and caching is on: computed twice, a block must not find its own keys there."""
    model = make_model("llama").requires_grad_(False)
    batches = [torch.randint(3, 97, (2, length)) for length in (6, 8)]

    def loss(model, ids):
        logits = model(input_ids=ids).logits
        return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"), ids[:, 1:].numel()

    targets = select_targets(model, "all-linear")
    _, gradients = stream_gradients(BlockStack.of(open_module(model)), targets, WholeModel(model, loss), batches)
    found = {gradient.name: gradient.G for gradient in gradients}
    truth = reference_gradients(model, targets, lambda: sum(loss(model, ids)[0] for ids in batches) / 24)
    assert max(relative_error(found[name], truth[name]) for name in targets) < FP32_INSIDE
    assert model.config.use_cache
