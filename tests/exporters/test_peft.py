"""PEFT directories from the single file and back: no byte is lost, and α/r scaling computes the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from support.causal import relative_error
from support.commands import content, error_line
from support.exports import ROUNDING, export, peft_logits, save_base, save_peft

from loraone_init import Adapter


def test_directory_and_back_is_the_same_file(tiny_model: Path, initialised: Path, tmp_path: Path) -> None:
    directory, again = tmp_path / "peft", tmp_path / "again.safetensors"
    assert export("peft", tiny_model, initialised, "-o", directory).exit_code == 0
    assert export("peft", tiny_model, directory, "-o", again).exit_code == 0
    assert again.read_bytes() == initialised.read_bytes()


def test_directory_is_what_the_initialisation_would_have_written(
    tiny_model: Path, initialised: Path, tmp_path: Path
) -> None:
    assert export("peft", tiny_model, initialised, "-o", tmp_path / "peft").exit_code == 0
    Adapter.load(initialised).save(tmp_path / "saved")
    (tmp_path / "peft" / "loraone-export.yaml").unlink()
    assert content(tmp_path / "peft") == content(tmp_path / "saved")


@pytest.mark.parametrize("name", ["plain", "plain.safetensors"])
def test_plain_scaling_keeps_factors_record_and_scale(
    name: str, tiny_model: Path, initialised: Path, tmp_path: Path
) -> None:
    plain = tmp_path / name
    assert export("peft", tiny_model, initialised, "-o", plain, "--plain-scaling").exit_code == 0
    with (
        safe_open(initialised, "pt") as before,
        safe_open(plain if plain.is_file() else plain / "adapter_model.safetensors", "pt") as after,
    ):
        old, new = before.metadata(), after.metadata()
    config = json.loads(new.pop("peft_config"))
    assert config["use_rslora"] is False
    assert config["lora_alpha"] / config["r"] == pytest.approx(json.loads(old["loraone"])["scale"], rel=1e-15)
    del old["peft_config"]
    assert new == old
    assert Adapter.load(plain).config == Adapter.load(initialised).config
    for module, pair in Adapter.load(plain).pairs.items():
        assert pair.A.equal(Adapter.load(initialised).pairs[module].A)
    if plain.is_dir():
        assert json.loads((plain / "adapter_config.json").read_text()) == config
        assert export("peft", tiny_model, plain, "-o", tmp_path / "file.safetensors").exit_code == 0


def test_plain_scaling_computes_the_same(tmp_path: Path) -> None:
    """With ranks and αs of single layers; a reader that ignored rsLoRA before is right now."""
    base, adapter, plain, wrong = (tmp_path / part for part in ("base", "adapter", "plain", "wrong"))
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"1.mlp.up_proj": 32}}
    save_peft(adapter, save_base(base), use_rslora=True, **patterns)
    assert export("peft", base, adapter, "-o", plain, "--plain-scaling").exit_code == 0
    config = json.loads((plain / "adapter_config.json").read_text())
    assert config["use_rslora"] is False
    assert (
        load_file(plain / "adapter_model.safetensors").keys() == load_file(adapter / "adapter_model.safetensors").keys()
    )
    expected = peft_logits(base, adapter)
    assert relative_error(peft_logits(base, plain), expected) < ROUNDING
    assert export("peft", base, adapter, "-o", wrong).exit_code == 0
    ignoring = json.loads((wrong / "adapter_config.json").read_text()) | {"use_rslora": False}
    (wrong / "adapter_config.json").write_text(json.dumps(ignoring))
    assert relative_error(peft_logits(base, wrong), expected) > 0.01


def test_directory_of_another_tool_has_no_single_file(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_peft(adapter, save_base(base))
    before = content(tmp_path)
    result = export("peft", base, adapter, "-o", tmp_path / "a.safetensors")
    assert result.exit_code == 1
    assert "has no record of an initialisation" in error_line(result.stderr)
    assert content(tmp_path) == before


def test_edited_scale_is_no_single_file(tiny_model: Path, initialised: Path, tmp_path: Path) -> None:
    directory = tmp_path / "peft"
    assert export("peft", tiny_model, initialised, "-o", directory).exit_code == 0
    config = json.loads((directory / "adapter_config.json").read_text())
    (directory / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 32}))
    result = export("peft", tiny_model, directory, "-o", tmp_path / "a.safetensors")
    assert result.exit_code == 1
    assert "has been edited: layer model.layers.0" in error_line(result.stderr)
    assert not (tmp_path / "a.safetensors").exists()


def test_edited_name_of_the_base_goes_into_the_single_file(tiny_model: Path, initialised: Path, tmp_path: Path) -> None:
    directory, file = tmp_path / "peft", tmp_path / "a.safetensors"
    assert export("peft", tiny_model, initialised, "-o", directory).exit_code == 0
    config = json.loads((directory / "adapter_config.json").read_text()) | {"base_model_name_or_path": "org/naïve"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    assert export("peft", tiny_model, directory, "-o", file).exit_code == 0
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["peft_config"]) == config
    for name, tensor in load_file(initialised).items():
        assert load_file(file)[name].equal(tensor)


def test_later_format_is_refused(tiny_model: Path, initialised: Path, tmp_path: Path) -> None:
    later = tmp_path / "later.safetensors"
    data = initialised.read_bytes()
    later.write_bytes(data.replace(b'"format_version":"1"', b'"format_version":"2"'))
    assert later.read_bytes() != data
    result = export("peft", tiny_model, later, "-o", tmp_path / "peft")
    assert result.exit_code == 1
    assert "format version 2" in error_line(result.stderr)
