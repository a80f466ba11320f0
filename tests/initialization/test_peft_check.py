"""What PEFT would not take is told before the passes, by name."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from threading import Lock

import pytest
import torch
from peft import PeftModel
from support.causal import VOCABULARY, make_batches, make_model
from transformers import LagunaConfig, LagunaForCausalLM, Mamba2Config, Mamba2ForCausalLM

from loraone_init import InitConfig, initialize
from loraone_init.errors import ModelError
from loraone_init.initialization.peft_check import taken_by_peft
from loraone_init.layers.targets import select_targets

OUT_PROJ = [f"backbone.layers.{i}.mixer.out_proj" for i in range(2)]


def make_mamba() -> Mamba2ForCausalLM:
    """PEFT refuses its out_proj."""
    sizes = {"hidden_size": 16, "num_heads": 4, "head_dim": 8, "n_groups": 1, "state_size": 4, "chunk_size": 4}
    return Mamba2ForCausalLM(Mamba2Config(vocab_size=VOCABULARY, num_hidden_layers=2, **sizes))


def make_laguna() -> LagunaForCausalLM:
    """PEFT renames its shared experts while it loads, to names that the model does not have."""
    torch.manual_seed(0)
    config = LagunaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        num_experts=2,
        num_experts_per_tok=1,
        mlp_layer_types=["dense", "sparse"],
    )
    return LagunaForCausalLM(config).eval()


def test_layers_that_it_refuses_are_left_out(caplog):
    model = make_mamba()
    targets = select_targets(model, "all-linear")
    left = taken_by_peft(model, targets, InitConfig())
    assert [name for name in targets if name not in left] == OUT_PROJ
    (message,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert message.startswith(
        "PEFT does not take 2 of 4 layers, which are left out (out_proj), such as backbone.layers.0.mixer.out_proj: "
    )
    assert "Module 'out_proj' is incompatible with Mamba-based models" in message
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_layers_asked_for_by_name_are_an_error():
    model, config = make_mamba(), InitConfig(target_modules=("in_proj", "out_proj"))
    with pytest.raises(ModelError, match=r'does not take 2 of 4 layers.*; leave them out with `exclude_modules="out_'):
        taken_by_peft(model, select_targets(model, config.target_modules), config)


def test_an_adapter_of_less_than_half_is_an_error():
    model, config = make_mamba(), InitConfig(exclude_modules=("in_proj",))
    with pytest.raises(ModelError, match="does not take 2 of 2 layers"):
        taken_by_peft(model, select_targets(model, "all-linear", config.exclude_modules), config)


def test_layers_that_it_would_not_load_are_left_out(tmp_path, caplog):
    adapter = initialize(make_laguna(), make_batches((9,)), rank=2)
    assert "PEFT does not take 3 of" in caplog.text
    assert not any("shared_expert" in name for name in adapter.pairs)
    adapter.save(tmp_path / "adapter")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        peft = PeftModel.from_pretrained(make_laguna(), tmp_path / "adapter")
    assert not [w for w in caught if "adapter keys" in str(w.message)]
    factors = [name for name, _ in peft.named_parameters() if ".lora_" in name]
    assert len(factors) == 2 * len(adapter.tensors())


def test_all_layers_of_an_ordinary_model_are_taken(caplog):
    model = make_model("gpt2", torch.float32)
    targets = select_targets(model, "all-linear")
    assert taken_by_peft(model, targets, InitConfig()) == targets
    assert caplog.text == ""


def test_what_was_found_is_remembered_with_the_model(tmp_path, monkeypatch, caplog):
    """For these layers and options."""
    make_mamba().save_pretrained(tmp_path)
    monkeypatch.setattr("loraone_init.cache._SETTLED", -60)
    model = make_mamba()
    targets = select_targets(model, "all-linear")
    first = taken_by_peft(model, targets, InitConfig(), tmp_path)
    monkeypatch.setattr(
        "loraone_init.initialization.peft_check._Trial.taken", lambda *given: pytest.fail("tried again")
    )
    assert taken_by_peft(model, targets, InitConfig(), tmp_path) == first
    assert len({record.getMessage() for record in caplog.records if record.levelno == logging.WARNING}) == 1
    with pytest.raises(pytest.fail.Exception, match="tried again"):
        taken_by_peft(model, targets, InitConfig(rank=4), tmp_path)


def test_nothing_is_tried_without_peft(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    model = make_mamba()
    targets = select_targets(model, "all-linear")
    assert taken_by_peft(model, targets, InitConfig()) == targets


def test_a_model_that_cannot_be_copied_is_left_alone():
    model = make_mamba()
    model.lock = Lock()
    targets = select_targets(model, "all-linear")
    assert taken_by_peft(model, targets, InitConfig()) == targets
