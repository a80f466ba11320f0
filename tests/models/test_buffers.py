"""Buffers that no checkpoint holds are those of `from_pretrained`, bit for bit."""

from __future__ import annotations

import pytest
import torch
from support.causal import VOCABULARY, make_model
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    FalconH1Model,
    GPTJConfig,
    LlamaConfig,
    PreTrainedModel,
)

from loraone_init.errors import ModelError
from loraone_init.models.opening import open_model

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}

CONFIGS = {
    "falcon-h1": lambda: FalconH1Config(  # the whole model fills a buffer in each of its blocks
        **SIZES,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        mamba_d_ssm=16,
        mamba_n_heads=2,
        mamba_d_head=8,
        mamba_d_state=8,
        ssm_multipliers=[0.5, 0.6, 0.7, 0.8, 0.9],
    ),
    "gptj": lambda: GPTJConfig(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, rotary_dim=4),
    "llama-yarn": lambda: LlamaConfig(
        **SIZES,
        num_attention_heads=2,
        rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
    ),
}


def computed_buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    stored = model.state_dict()
    return {name: buffer for name, buffer in model.named_buffers() if name not in stored}


@pytest.mark.parametrize("name", [*CONFIGS, "gemma3", "gemma3n"])
def test_equal_to_from_pretrained(name, tmp_path):
    if name in CONFIGS:
        AutoModelForCausalLM.from_config(CONFIGS[name]()).save_pretrained(tmp_path)
    else:
        make_model(name, torch.float32).save_pretrained(tmp_path)
    expected = computed_buffers(AutoModelForCausalLM.from_pretrained(tmp_path))
    found = computed_buffers(open_model(str(tmp_path)).module)
    assert found.keys() == expected.keys() != set()
    for buffer in expected:
        assert torch.equal(found[buffer], expected[buffer]), buffer
        assert found[buffer].dtype == expected[buffer].dtype


def test_one_that_nothing_computes_is_refused_by_name(tmp_path, monkeypatch):
    AutoModelForCausalLM.from_config(CONFIGS["falcon-h1"]()).save_pretrained(tmp_path)
    monkeypatch.setattr(FalconH1ForCausalLM, "_init_weights", PreTrainedModel._init_weights)
    monkeypatch.setattr(FalconH1Model, "_init_weights", PreTrainedModel._init_weights)
    with pytest.raises(ModelError, match=r"lacks the buffer model\.layers\.0\.mamba\.mup_vector of FalconH1"):
        open_model(str(tmp_path))
