"""Models are opened as the class that trainers open; which parts of them are language, blocks, and linear layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    CLIPVisionConfig,
    FalconConfig,
    FalconForCausalLM,
    FunnelConfig,
    FunnelForSequenceClassification,
    Llama4Config,
    Llama4ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PhimoeConfig,
    PhimoeForCausalLM,
)

from loraone_init.layers.language import find_decoder
from loraone_init.layers.targets import left_out_layers, select_targets
from loraone_init.models.blocks import find_blocks
from loraone_init.models.classes import model_class
from loraone_init.models.opening import open_model

_TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def llava_config() -> LlavaConfig:
    return LlavaConfig(text_config=LlamaConfig(**_TEXT), vision_config=CLIPVisionConfig(**_VISION), image_token_id=63)


def on_meta(model_class, config):
    with torch.device("meta"):
        return model_class(config)


def test_a_checkpoint_is_opened_as_its_own_class_and_its_vision_tower_left_out(tmp_path: Path):
    llava_config().save_pretrained(tmp_path)
    LlavaForConditionalGeneration(llava_config()).save_pretrained(tmp_path)
    opened = open_model(str(tmp_path), weights=False)
    assert type(opened.module) is LlavaForConditionalGeneration
    targets = select_targets(opened.module, "all-linear")
    assert len(targets) == 2 * 7
    assert all(name.startswith("model.language_model.layers.") for name in targets)
    everything = select_targets(opened.module, "all-linear", vision_layers=True)
    assert len(everything) == len(targets) + left_out_layers(opened.module)
    assert {"model.multi_modal_projector.linear_1", "model.vision_tower.encoder.layers.0.mlp.fc1"} <= everything.keys()


@pytest.mark.parametrize(
    ("config", "architecture", "task", "expected"),
    [
        (llava_config(), None, "causal-lm", "AutoModelForImageTextToText"),
        (llava_config(), "LlamaForCausalLM", "causal-lm", "AutoModelForImageTextToText"),
        (BertConfig(), "BertForMaskedLM", "causal-lm", "AutoModelForCausalLM"),
        (BertConfig(), "NoSuchClass", "causal-lm", "AutoModelForCausalLM"),
        (LlamaConfig(), "LlamaForCausalLM", "sequence-classification", "AutoModelForSequenceClassification"),
        (LlamaConfig(), "LlamaForCausalLM", "causal-lm", "LlamaForCausalLM"),
        (LlamaConfig(), ["x", 3], "causal-lm", "AutoModelForCausalLM"),
    ],
)
def test_class_of_a_configuration(config, architecture, task, expected):
    config.architectures = [architecture] if isinstance(architecture, str) else architecture
    assert model_class(config, task).__name__ == expected


def test_blocks_that_nothing_marks():
    gpt = on_meta(OpenAIGPTLMHeadModel, OpenAIGPTConfig(n_layer=3, n_embd=32, n_head=4, vocab_size=64))
    assert find_blocks(gpt) == [f"transformer.h.{index}" for index in range(3)]
    albert = on_meta(AlbertForSequenceClassification, AlbertConfig(**_TEXT, num_hidden_groups=1))
    assert find_blocks(albert) == ["albert.encoder.albert_layer_groups.0"]
    sizes = {"block_sizes": [2, 2], "d_model": 32, "n_head": 4}
    funnel = on_meta(FunnelForSequenceClassification, FunnelConfig(**sizes))
    assert find_blocks(funnel) == [f"funnel.encoder.blocks.{name}" for name in ("0.0", "0.1", "1.0", "1.1")]


def test_a_router_with_a_forward_of_its_own_is_no_linear_layer(caplog: pytest.LogCaptureFixture):
    phimoe = on_meta(PhimoeForCausalLM, PhimoeConfig(**_TEXT, num_local_experts=4))
    assert not [name for name in select_targets(phimoe, "all-linear") if name.endswith("router")]
    assert "PhimoeTopKRouter are left out" in caplog.text
    falcon = on_meta(
        FalconForCausalLM, FalconConfig(vocab_size=64, hidden_size=32, num_attention_heads=2, num_hidden_layers=1)
    )
    assert "transformer.h.0.self_attention.query_key_value" in select_targets(falcon, "all-linear")


def test_the_decoder_is_not_the_head():
    modernbert = on_meta(ModernBertDecoderForCausalLM, ModernBertDecoderConfig(**_TEXT | {"pad_token_id": 0}))
    assert find_decoder(modernbert) is modernbert.model
    vision = {**_VISION, "projector_input_dim": 16, "projector_output_dim": 16, "vision_output_dim": 16}
    text = {**_TEXT, "intermediate_size_mlp": 48, "num_local_experts": 2, "head_dim": 8}
    llama4 = on_meta(Llama4ForConditionalGeneration, Llama4Config(vision_config=vision, text_config=text))
    assert find_decoder(llama4) is llama4.language_model.model


def test_parameters_that_no_checkpoint_holds_are_computed(tmp_path: Path):
    config = MarianConfig(
        vocab_size=64,
        decoder_vocab_size=64,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=32,
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    MarianMTModel(config).save_pretrained(tmp_path)
    opened = open_model(str(tmp_path), task="seq2seq-lm")
    expected = MarianMTModel.from_pretrained(tmp_path, dtype=torch.float32)
    position = "model.encoder.embed_positions.weight"
    assert torch.equal(opened.module.get_parameter(position), expected.get_parameter(position))
