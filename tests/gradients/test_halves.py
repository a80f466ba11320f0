"""The gradients of a sample in two halves: each is that of its rows, and both add up to the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.causal import make_batches, make_model, reference_gradients, reference_loss, relative_error
from support.little_memory import LittleMemory
from torch import nn

from loraone_init.data.pieces import split_in_halves, whole_batches
from loraone_init.gradients.causal_lm import CausalLM
from loraone_init.gradients.stream import stream_gradients
from loraone_init.layers.targets import select_targets
from loraone_init.linalg.layer_gradient import LayerGradient
from loraone_init.models.opening import open_module
from loraone_init.streaming.stack import BlockStack

CPU = torch.device("cpu")
FP32_INSIDE = 1e-6
"""fp64 models, but for norms and softmax that compute in fp32 whatever the model; a wrong row would be seen by far."""


def in_halves(model: nn.Module, batches: list[Any], stack: BlockStack | None = None) -> dict[str, LayerGradient]:
    _, gradients = stream_gradients(
        stack or BlockStack.of(open_module(model.requires_grad_(False))),
        select_targets(model, "all-linear"),
        CausalLM(model, CPU),
        batches,
        in_halves=True,
    )
    return {gradient.name: gradient for gradient in gradients}


def label_count(batches: list[Any]) -> int:
    return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma3n"])
def test_each_part_is_the_gradient_of_its_half(name: str) -> None:
    """By whole-model autograd on the half's rows alone; opt has layers outside of its blocks."""
    model, batches = make_model(name), make_batches((9, 12), rows=3)
    found = in_halves(model, batches)
    targets = select_targets(model, "all-linear")
    pieces = split_in_halves(whole_batches(batches, by_row=True))
    for half in (0, 1):
        own = [piece.content for piece in pieces if piece.half == half]
        share = label_count(own) / label_count(batches)
        truth = reference_gradients(model, targets, lambda own=own: reference_loss(model, own))
        for layer, G in truth.items():
            assert relative_error(found[layer].parts[half], share * G) < FP32_INSIDE, layer


@pytest.mark.parametrize("wide", [1, 2048])
def test_the_parts_add_up_to_the_whole_gradient(wide: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long products wait."""
    monkeypatch.setattr("loraone_init.gradients.collector.WIDE_TOKENS", wide)
    model, batches = make_model("llama"), make_batches((9, 12, 7), rows=3)
    truth = reference_gradients(model, select_targets(model, "all-linear"), lambda: reference_loss(model, batches))
    found = in_halves(model, batches)
    assert found.keys() == truth.keys()
    assert all(relative_error(found[layer].G, G) < FP32_INSIDE for layer, G in truth.items())
    assert all(len(gradient.parts) == 2 for gradient in found.values())


@pytest.mark.parametrize("backward_only", [False, True], ids=["forward", "backward"])
def test_micro_batches_without_memory_keep_their_half(backward_only: bool) -> None:
    """Rows of those that are run in smaller parts stay where they belong."""
    model, batches = make_model("llama").requires_grad_(False), make_batches((9, 12), rows=7)
    truth = in_halves(model, batches)
    found = in_halves(model, batches, LittleMemory(model, 2, backward_only=backward_only))
    for layer, gradient in truth.items():
        for half in (0, 1):
            assert relative_error(found[layer].parts[half], gradient.parts[half]) < FP32_INSIDE, layer
