"""PEFT's names, in files and in models, by one function each way."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from loraone_init.adapter.files import PREFIX, split_name, tensor_names


def test_names_are_those_of_a_model_that_peft_wraps() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(3, 2)), LoraConfig(r=1, target_modules=["0"]))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {*tensor_names("0", "default")} == trained


def test_names_are_those_of_peft_s_files() -> None:
    from peft import get_peft_model_state_dict

    model = get_peft_model(nn.Sequential(nn.Linear(3, 2)), LoraConfig(r=1, target_modules=["0"]))
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(model)
    assert {*tensor_names("0")} == set(state)


@pytest.mark.parametrize("module", ["q_proj", "model.layers.0.mlp.up_proj", "a.lora_A.weight"])
def test_split_name_undoes_tensor_names(module: str) -> None:
    assert [split_name(name) for name in tensor_names(module)] == [(module, "lora_A"), (module, "lora_B")]
    assert split_name(tensor_names(module)[0].removeprefix(PREFIX)) == (module, "lora_A")


@pytest.mark.parametrize(
    "name",
    ["", "weight", "lora_A.weight", "a.lora_A", "a.lora_C.weight", "a.weight", "a.lora_A.bias", "a.mylora_A.weight"],
)
def test_other_names_are_no_factors(name: str) -> None:
    assert split_name(name) is None
    assert split_name(PREFIX + name) is None
