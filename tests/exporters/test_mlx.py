"""Adapters for mlx-lm: read by mlx-lm itself, they compute what PEFT computes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.causal import make_model, relative_error
from support.commands import error_line
from support.exports import check_refusal, export, peft_logits, save_base, save_peft
from support.mlx_runs import mlx_logits

from loraone_init import Adapter

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mlx_lm") is None, reason="mlx-lm is not installed: pip install -e '.[mlx]'"
)

MLX = 1e-4  # relative; other kernels in fp32, whose exponentials and norms are less exact


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_logits_are_pefts(name: str, tmp_path: Path) -> None:
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "mlx"
    save_peft(adapter, save_base(base, name), use_rslora=True)
    result = export("mlx", base, adapter, "-o", out)
    assert result.exit_code == 0, result.output
    expected = peft_logits(base, adapter)[:1]
    assert relative_error(mlx_logits(base, out), expected) < MLX
    assert relative_error(mlx_logits(base), expected) > 0.01


def test_rotary_bases_by_kind_of_attention(tmp_path: Path) -> None:
    """Gemma 3 has two, each in a mapping of its own; mlx-lm cannot run one of fewer than six layers."""
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "mlx"
    save_peft(adapter, save_base(base, "gemma3"), use_rslora=True)
    result = export("mlx", base, adapter, "-o", out)
    assert result.exit_code == 0, result.output
    assert len(load_file(out / "adapters.safetensors")) == 2 * 3 * 7


def test_our_file(tiny_model: Path, initialised: Path, tmp_path: Path) -> None:
    """Tensors are the factors transposed, bit for bit; the configuration is the one that mlx-lm itself writes."""
    out = tmp_path / "mlx"
    assert export("mlx", tiny_model, initialised, "-o", out).exit_code == 0
    adapter, tensors = Adapter.load(initialised), load_file(out / "adapters.safetensors")
    assert len(tensors) == 2 * len(adapter.pairs)
    for module, pair in adapter.pairs.items():
        assert tensors[f"{module}.lora_a"].equal(pair.A.T)
        assert tensors[f"{module}.lora_b"].equal(pair.B.T)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["num_layers"] == 3
    assert config["lora_parameters"]["scale"] == adapter.config.scale
    assert "self_attn.q_proj" in config["lora_parameters"]["keys"]
    adapter.save(tmp_path / "peft")
    assert relative_error(mlx_logits(tiny_model, out), peft_logits(tiny_model, tmp_path / "peft")[:1]) < MLX


@pytest.mark.parametrize(
    ("settings", "num_layers", "key"),
    [
        ({"target_modules": ["q_proj"], "layers_to_transform": [1, 2]}, 2, "self_attn.q_proj"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}, 3, "model.layers.0.self_attn.q_proj"),
        ({"target_modules": ["lm_head", "up_proj"]}, 3, "lm_head"),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"1.mlp.up_proj": 32}}, 3, "mlp.up_proj"),
    ],
    ids=["last layers", "some layers", "output embedding", "ranks and scales"],
)
def test_adapters_of_some_layers(settings: dict[str, object], num_layers: int, key: str, tmp_path: Path) -> None:
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "mlx"
    save_peft(adapter, save_base(base), **settings)
    assert export("mlx", base, adapter, "-o", out).exit_code == 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["num_layers"] == num_layers
    assert key in config["lora_parameters"]["keys"]
    assert relative_error(mlx_logits(base, out), peft_logits(base, adapter)[:1]) < MLX


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("opt", {}, "mlx-lm cannot open"),
        ("gpt2", {}, "mlx-lm cannot open"),
        ("llama", {"modules_to_save": ["embed_tokens"]}, "replaces model.embed_tokens.weight"),
    ],
)
def test_what_mlx_lm_cannot_read_is_refused(name: str, settings: dict[str, object], told: str, tmp_path: Path) -> None:
    check_refusal("mlx", "mlx", name, settings, told, tmp_path)


def test_a_base_that_mlx_lm_misreads_is_pointed_out(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = make_model("llama", torch.float32)
    model.config.rope_parameters["rope_theta"] = 5e5
    model.save_pretrained(base)
    save_peft(adapter, model)
    result = export("mlx", base, adapter, "-o", tmp_path / "mlx")
    assert result.exit_code == 0
    assert "Warning: mlx-lm takes the rotary base of" in result.stderr


def test_missing_package_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mlx_lm" else find(name))
    missing = tmp_path / "neither model nor adapter"  # the package is asked for before anything is opened
    result = export("mlx", missing, missing, "-o", tmp_path / "mlx")
    assert result.exit_code == 1
    assert 'needs mlx-lm, which is not installed: in the clone of loraone-init, pip install ".[mlx]"' in error_line(
        result.stderr
    )
