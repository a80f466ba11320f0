"""What is used of transformers without a promise that it stays: in one file, and there in the installed version."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.specifiers import SpecifierSet
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.core_model_loading import WeightConverter

from loraone_init import transformers_private as private

PRIVATE = (
    "_get_dtype_plan",
    "_init_weights",
    "_keys_to_ignore_on_load_missing",
    "_no_split_modules",
    "_apply_gate",
    "all_tied_weights_keys",
    "conversion_mapping",
    "core_model_loading",
    "GradientCheckpointingLayer",
)
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("name", PRIVATE)
def test_name_stands_in_one_file(name: str) -> None:
    files = [path for folder in ("loraone_init", "exporters") for path in (ROOT / folder).rglob("*.py")]
    found = {path.name for path in files if re.search(rf"\b{name}\b", path.read_text(encoding="utf-8"))}
    assert found == {"transformers_private.py"}


def test_version_is_bounded_and_the_installed_one_within() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (wanted,) = (SpecifierSet(found) for found in re.findall(r'"transformers([^"\w.]+[^"]*)"', text))
    assert {bound.operator for bound in wanted} == {">=", "<"}
    assert wanted.contains(version("transformers"))


def test_blocks_are_told_in_two_ways(llama: LlamaForCausalLM) -> None:
    block = llama.model.layers[0]
    assert private.is_checkpointing_layer(block)
    assert type(block).__name__ in private.unsplit_classes(llama)
    assert not private.is_checkpointing_layer(llama.lm_head)
    assert private.unsplit_classes(nn.Linear(1, 1)) == set()


def test_ties_are_told(llama: LlamaForCausalLM) -> None:
    assert private.tied_parameters(llama) == {"lm_head.weight": "model.embed_tokens.weight"}


def test_buffers_are_computed_and_weights_on_the_meta_device_stay_there(llama: LlamaForCausalLM) -> None:
    with torch.device("meta"):
        empty = LlamaForCausalLM(llama.config)
    rotary = empty.model.rotary_emb
    rotary.inv_freq = torch.full_like(rotary.inv_freq, torch.nan, device="cpu")
    private.initialize(empty, rotary)
    private.initialize(empty, empty.lm_head)
    assert torch.equal(rotary.inv_freq, llama.model.rotary_emb.inv_freq)
    assert empty.lm_head.weight.is_meta


def test_a_model_s_own_names_need_no_conversion(llama: LlamaForCausalLM) -> None:
    state = llama.state_dict()
    conversions = private.conversions_of(llama)
    assert not [one for one in conversions.converters if not isinstance(one, WeightConverter)]
    for name in state:
        assert conversions.target(name, llama, state) == (name, None, None)
    assert conversions.target("embed_tokens.weight", llama, state)[0] == "model.embed_tokens.weight"
    assert private.as_stored(llama, {"lm_head.weight": state["lm_head.weight"]}).keys() == {"lm_head.weight"}
