"""A model that cannot be padded is run with rows of one length together."""

from __future__ import annotations

import logging

import pytest
import torch
from support.architectures import THREE, make_classifier, make_texts
from support.causal import VOCABULARY, make_word_tokenizer, reference_loss
from torch import nn
from transformers import AutoModelForSequenceClassification, CpmAntConfig, CpmAntForCausalLM, FNetConfig

from loraone_init import initialize, load_sample
from loraone_init.data.batches import without_padding
from loraone_init.gradients.classification import SequenceClassification
from loraone_init.gradients.stream import stream_losses
from loraone_init.initialization.padding import can_be_padded, unpadded
from loraone_init.models.opening import open_module
from loraone_init.processes.processes import Alone
from loraone_init.streaming.stack import BlockStack

FP32 = 1e-4


def make_fnet() -> nn.Module:
    """Mixes all positions by a Fourier transform; it has no attention mask."""
    torch.manual_seed(0)
    config = FNetConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        max_position_embeddings=16,
        num_labels=3,
        pad_token_id=0,
    )
    model = AutoModelForSequenceClassification.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(1.0 if parameter.ndim == 1 else 5.0)
    return model


def one_by_one(batches):
    """Each row of padded batches without its padding."""
    for batch in batches:
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            yield {
                name: value[row : row + 1, :length] if value.ndim == 2 else value[row : row + 1]
                for name, value in batch.items()
            }


def test_adapter_is_that_of_rows_one_by_one(caplog):
    batches = make_texts((9, 6), rows=3)
    with caplog.at_level(logging.WARNING):
        found = initialize(make_fnet(), batches, rank=2, gamma=128.0)
    assert caplog.text.count("FNetForSequenceClassification cannot be padded: the loss of a row") == 1
    expected = initialize(make_fnet(), list(one_by_one(batches)), rank=2, gamma=128.0)
    assert found.loss.sample == pytest.approx(expected.loss.sample, rel=FP32)
    for name, pair in expected.pairs.items():
        torch.testing.assert_close(found.pairs[name].B @ found.pairs[name].A, pair.B @ pair.A, rtol=0, atol=FP32)


def test_rows_of_a_sample_are_grouped_anew_and_a_causal_model_too(caplog):
    """CPM-Ant makes a mask of its own, for padding on the left."""
    torch.manual_seed(0)
    config = CpmAntConfig(
        vocab_size=VOCABULARY, hidden_size=16, dim_ff=16, num_hidden_layers=2, num_attention_heads=2, dim_head=8
    )
    sample = load_sample([{"text": " ".join(f"w{i}" for i in range(n))} for n in (3, 5, 3, 8)], make_word_tokenizer())
    assert [len(batch["input_ids"]) for batch in sample.batches] == [4]
    model = CpmAntForCausalLM(config).eval()
    with caplog.at_level(logging.WARNING):
        adapter = initialize(model, sample, rank=2, block_path="cpmant.encoder.layers")
    assert "CpmAntForCausalLM cannot be padded" in caplog.text
    assert "its loss is no causal language model's, since it sees the tokens that it is to predict" in caplog.text
    assert adapter.loss.sample == pytest.approx(reference_loss(model, [*one_by_one(sample.batches)]).item(), rel=FP32)


def test_one_row_alone_tells_where_padding_makes_no_difference():
    """The row with most padding, and nothing where there is none."""
    model = make_classifier("bert", torch.float32, num_labels=3).requires_grad_(False)
    opened = open_module(model)
    objective = SequenceClassification(model, opened.device, THREE)
    batches, stack = make_texts((9, 6)), BlockStack.of(opened)
    losses, runs = stream_losses(stack, objective, batches), []

    class Recorded(SequenceClassification):
        def forward(self, batch):
            runs.append(tuple(batch["input_ids"].shape))
            return super().forward(batch)

    recorded = Recorded(model, opened.device, THREE)
    assert can_be_padded(stack, recorded, batches, losses, Alone())
    assert runs == [(1, 4)]
    without = [part for batch in batches for part in without_padding(batch)]
    assert can_be_padded(stack, recorded, without, stream_losses(stack, objective, without), Alone()) is None
    assert len(runs) == 1
    assert unpadded(batches)[0]["attention_mask"].all()
