"""Adapters that PEFT alone has written are shown, with less to tell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from support.commands import error_line
from support.exports import save_base, save_peft

from loraone_init.cli.inspect import main


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    save_peft(tmp_path / "adapter", save_base(tmp_path / "base"), use_rslora=True, alpha_pattern={"q_proj": 32})
    return tmp_path / "adapter"


def inspect(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_change_of_every_layer(adapter: Path) -> None:
    shown = inspect(adapter, "--json")
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    assert found["record"] is None
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert len(found["layers"]) == len(tensors) / 2
    for name, layer in found["layers"].items():
        A, B = (tensors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        scale = (32 if name.endswith("q_proj") else 8) / 2  # α/√4
        assert (layer["rank"], layer["scale"]) == (4, scale)
        expected = torch.linalg.svdvals(scale * B @ A)[:4]
        assert layer["step_singular_values"] == pytest.approx(expected.tolist(), rel=1e-6)


def test_table(adapter: Path) -> None:
    shown = inspect(adapter)
    assert shown.exit_code == 0, shown.output
    assert "An adapter of another tool" in shown.stdout
    assert "21 of rank 4, s = 4 to 16" in shown.stdout
    assert "self_attn.q_proj" in shown.stdout


def test_what_needs_a_record_says_so(adapter: Path, tmp_path: Path) -> None:
    shown = inspect(adapter, "--html", tmp_path / "page.html")
    assert shown.exit_code == 1
    assert "has no loraone metadata" in error_line(shown.stderr)


def test_modules_held_whole_are_passed_over(tmp_path: Path) -> None:
    save_peft(tmp_path / "adapter", save_base(tmp_path / "base"), modules_to_save=["lm_head"])
    shown = inspect(tmp_path / "adapter", "--json")
    assert shown.exit_code == 0, shown.output
    assert len(json.loads(shown.stdout)["layers"]) == 21


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"use_dora": True}, "it uses DoRA"), ({"init_lora_weights": "pissa"}, "it was initialised with pissa")],
)
def test_change_that_is_not_the_factors_alone(settings: dict[str, object], told: str, tmp_path: Path) -> None:
    save_peft(tmp_path / "adapter", save_base(tmp_path / "base"), **settings)
    shown = inspect(tmp_path / "adapter")
    assert (shown.exit_code, shown.stdout) == (1, "")
    assert told in error_line(shown.stderr)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"peft_type": "LORA"}', '{"peft_type": "IA3"}'])
def test_configurations_that_are_broken(text: str, adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text(text)
    shown = inspect(adapter)
    assert shown.exit_code == 1
    assert "adapter" in error_line(shown.stderr)
