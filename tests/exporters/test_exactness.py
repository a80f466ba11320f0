"""What PEFT computes otherwise than W + s·B·A on the base as it is, and what lacks tensors: refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.commands import error_line
from support.exports import export, save_base, save_peft

WEIGHTS = "adapter_model.safetensors"


def refusal(tmp_path: Path, *arguments: object, target: str = "merged") -> str:
    """The line with which an export of `adapter` on `base` ends; nothing is written."""
    result = export(target, tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out", *arguments)
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert not (tmp_path / "out").exists()
    return error_line(result.stderr)


def edit_config(adapter: Path, **changes: object) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(adapter: Path, changes: dict[str, torch.Tensor]) -> None:
    file = adapter / WEIGHTS
    save_file(load_file(file) | changes, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"bias": "all"}, "bias 'all'"),
        ({"init_lora_weights": "pissa"}, "initialised with pissa"),
        ({"init_lora_weights": "olora"}, "initialised with olora"),
        ({"trainable_token_indices": [3, 5]}, "trained tokens (trainable_token_indices)"),
        ({"lora_bias": True, "target_modules": ["q_proj"]}, "(lora_bias)"),
    ],
)
def test_more_than_plain_lora(settings: dict[str, object], told: str, tmp_path: Path) -> None:
    save_peft(tmp_path / "adapter", save_base(tmp_path / "base"), **settings)
    assert told in refusal(tmp_path)


@pytest.mark.parametrize("start", ["corda", "lora_ga", "loftq", "pissa_niter_4", "of_tomorrow"])
def test_initialisations_that_change_the_base(start: str, tmp_path: Path) -> None:
    save_peft(tmp_path / "adapter", save_base(tmp_path / "base"))
    edit_config(tmp_path / "adapter", init_lora_weights=start)
    assert f"initialised with {start}" in refusal(tmp_path)


def test_a_field_of_tomorrow(tmp_path: Path) -> None:
    """One that is off is taken; one that is on may mean anything."""
    save_peft(tmp_path / "adapter", save_base(tmp_path / "base"))
    edit_config(tmp_path / "adapter", use_of_tomorrow={"level": 3})
    assert "not known here (use_of_tomorrow)" in refusal(tmp_path)
    edit_config(tmp_path / "adapter", use_of_tomorrow=None)
    assert export("merged", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out").exit_code == 0


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [
        ("model.embed_tokens.weight", (99, 32), "model.embed_tokens.weight of shape (99, 32), the model's is (97, 32)"),
        ("model.layers.0.extra.weight", (4,), "model.layers.0.extra.weight, which is no tensor of LlamaForCausalLM"),
        ("model.embed_tokens.base_layer.weight", (97, 32), "model.embed_tokens.weight with other values"),
    ],
)
def test_whole_tensors(name: str, shape: tuple[int, ...], told: str, tmp_path: Path) -> None:
    save_peft(tmp_path / "adapter", save_base(tmp_path / "base"))
    edit_tensors(tmp_path / "adapter", {f"base_model.model.{name}": torch.ones(shape)})
    assert told in refusal(tmp_path)


def test_rank_of_the_configuration(tmp_path: Path) -> None:
    save_peft(tmp_path / "adapter", save_base(tmp_path / "base"))
    edit_config(tmp_path / "adapter", r=8)
    assert "has rank 4, its configuration says 8" in refusal(tmp_path)


def test_layers_of_the_record_are_all_there(tiny_model: Path, initialised: Path, tmp_path: Path) -> None:
    shortened = tmp_path / "shortened.safetensors"
    with safe_open(initialised, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if ".1.mlp.up_proj." not in name}  # noqa: SIM118
        save_file(tensors, shortened, file.metadata())
    result = export("merged", tiny_model, shortened, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "its record names layer model.layers.1.mlp.up_proj" in error_line(result.stderr)


def test_base_without_its_last_block(tmp_path: Path) -> None:
    """config.json says three blocks, the weights have two: the third would be drawn at random."""
    save_peft(tmp_path / "adapter", save_base(tmp_path / "base"), target_modules=["layers.0.mlp.up_proj"])
    file = tmp_path / "base" / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if ".layers.2." not in k}, file, {"format": "pt"})
    assert "lacks 9 tensors of LlamaForCausalLM, such as model.layers.2." in refusal(tmp_path)


def test_base_of_other_shapes(tmp_path: Path) -> None:
    save_peft(tmp_path / "adapter", save_base(tmp_path / "base"), target_modules=["q_proj"])
    file = tmp_path / "base" / "model.safetensors"
    save_file(load_file(file) | {"model.norm.weight": torch.ones(31)}, file, {"format": "pt"})
    assert "model.norm.weight of" in (line := refusal(tmp_path))
    assert "has shape (31,), the model expects (32,)" in line


def test_classification_without_a_head(tmp_path: Path) -> None:
    """Neither the base nor the adapter has one."""
    save_peft(tmp_path / "adapter", save_base(tmp_path / "base"), target_modules=["q_proj"])
    line = refusal(tmp_path, "--task", "text-classification", target="onnx")
    assert "lacks 1 tensors of LlamaForSequenceClassification, such as score.weight" in line
