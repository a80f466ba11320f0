"""Adapters for llama.cpp, read back with the gguf package. test_llama_cpp.py runs llama.cpp itself."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from support.causal import relative_error
from support.commands import content, error_line
from support.exports import check_refusal, export, save_base, save_peft

from loraone_init import Adapter

FP32 = 1e-6  # relative; one rounding of the scale and one product in another order
HEADS = {"q_proj": 4, "k_proj": 2}  # of the tiny models


def read(file: Path) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}


def change(file: Path, name: str) -> torch.Tensor:
    """What llama.cpp adds to a weight (out, in): α/r·B·A, in its own order of rows."""
    fields, tensors = read(file)
    A, B = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
    return fields["adapter.lora.alpha"] / len(A) * (B @ A)


def interleaved(W: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows i and i + d/2 of every head, which rotary embeddings turn against each other, as rows 2i and 2i + 1."""
    size = len(W) // heads
    order = [head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return W[order]


def test_our_file(tiny_model: Path, initialised: Path, tmp_path: Path) -> None:
    file = tmp_path / "adapter.gguf"
    assert export("gguf", tiny_model, initialised, "-o", file).exit_code == 0
    adapter = Adapter.load(initialised)
    fields, tensors = read(file)
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == pytest.approx(16 * math.sqrt(8), rel=FP32)
    assert len(tensors) == 2 * len(adapter.pairs)
    for module, name in [
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.up_proj", "ffn_up"),
    ]:
        pair = adapter.pairs[f"model.layers.1.{module}"]
        assert tensors[f"blk.1.{name}.weight.lora_a"].equal(pair.A)
        assert tensors[f"blk.1.{name}.weight.lora_b"].equal(pair.B)


@pytest.mark.parametrize("layer", HEADS)
def test_rows_of_q_and_k_are_interleaved(layer: str, tiny_model: Path, initialised: Path, tmp_path: Path) -> None:
    file = tmp_path / "adapter.gguf"
    assert export("gguf", tiny_model, initialised, "-o", file).exit_code == 0
    adapter = Adapter.load(initialised)
    pair = adapter.pairs[f"model.layers.2.self_attn.{layer}"]
    delta = adapter.config.scale * (pair.B @ pair.A)
    found = change(file, f"blk.2.attn_{layer[0]}.weight")
    assert relative_error(found, interleaved(delta, HEADS[layer])) < FP32
    assert relative_error(found, delta) > 0.1


def test_other_architectures_keep_the_rows(tmp_path: Path) -> None:
    base, adapter, file = tmp_path / "base", tmp_path / "adapter", tmp_path / "adapter.gguf"
    save_peft(adapter, save_base(base, "qwen3"), use_rslora=True)
    assert export("gguf", base, adapter, "-o", file).exit_code == 0
    factors = load_file(adapter / "adapter_model.safetensors")
    A, B = (factors[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight"] for side in "AB")
    assert relative_error(change(file, "blk.0.attn_q.weight"), 8 / math.sqrt(4) * (B @ A)) < FP32


def test_ranks_and_scales_of_single_layers(tmp_path: Path) -> None:
    base, adapter, file = tmp_path / "base", tmp_path / "adapter", tmp_path / "adapter.gguf"
    patterns = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"1.mlp.up_proj": 32}}
    save_peft(adapter, save_base(base), use_rslora=True, **patterns)
    assert export("gguf", base, adapter, "-o", file).exit_code == 0
    factors = load_file(adapter / "adapter_model.safetensors")
    for module, name, alpha, rank in [
        ("1.self_attn.v_proj", "blk.1.attn_v.weight", 8, 2),
        ("1.mlp.up_proj", "blk.1.ffn_up.weight", 32, 4),
        ("0.mlp.up_proj", "blk.0.ffn_up.weight", 8, 4),
    ]:
        A, B = (factors[f"base_model.model.model.layers.{module}.lora_{side}.weight"] for side in "AB")
        assert len(A) == rank
        assert relative_error(change(file, name), alpha / math.sqrt(rank) * (B @ A)) < FP32


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("opt", {}, "how llama.cpp has opt is not known here"),
        ("llama", {"modules_to_save": ["embed_tokens"]}, "replaces model.embed_tokens.weight"),
        ("gemma2", {"target_modules": ["lm_head", "q_proj"]}, "lm_head is tied to the input embedding"),
    ],
)
def test_what_llama_cpp_cannot_read_is_refused(
    name: str, settings: dict[str, object], told: str, tmp_path: Path
) -> None:
    check_refusal("gguf", "a.gguf", name, settings, told, tmp_path)


def test_output_is_a_gguf_file(tiny_model: Path, initialised: Path, tmp_path: Path) -> None:
    result = export("gguf", tiny_model, initialised, "-o", tmp_path / "adapter")
    assert "name it adapter.gguf" in error_line(result.stderr)
    file = tmp_path / "new" / "adapter.gguf"
    assert export("gguf", tiny_model, initialised, "-o", file, "--json").exit_code == 0
    before = content(tmp_path)
    result = export("gguf", tiny_model, initialised, "-o", file)
    assert "exists already" in error_line(result.stderr)
    assert content(tmp_path) == before
    result = export("gguf", tiny_model, initialised, "-o", file, "--overwrite", "--json")
    assert json.loads(result.stdout)["layers"] == 21


def test_missing_package_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    missing = tmp_path / "neither model nor adapter"  # the package is asked for before anything is opened
    result = export("gguf", missing, missing, "-o", tmp_path / "a.gguf")
    assert result.exit_code == 1
    assert 'needs gguf, which is not installed: in the clone of loraone-init, pip install ".[gguf]"' in error_line(
        result.stderr
    )
