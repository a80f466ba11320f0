"""Merged models: equal to base + adapter as PEFT computes it, tensor by tensor, for every form of checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support.causal import CAUSAL_CONFIGS, make_model, relative_error
from support.commands import content, error_line
from support.exports import ROUNDING, export, logits_of, make_moe, peft_logits, save_base, save_peft
from transformers import AutoModelForCausalLM

EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


@pytest.mark.parametrize("name", CAUSAL_CONFIGS)
def test_logits_equal_base_and_adapter(name: str, tmp_path: Path) -> None:
    """Conv1D, tied embeddings, layers outside of blocks: the merged model computes what PEFT computes."""
    base, adapter, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    save_peft(adapter, save_base(base, name), use_rslora=True)
    result = export("merged", base, adapter, "-o", merged)
    assert result.exit_code == 0, result.output
    model, loading = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    expected = peft_logits(base, adapter)
    assert relative_error(logits_of(model), expected) < ROUNDING
    assert relative_error(logits_of(AutoModelForCausalLM.from_pretrained(base)), expected) > 0.01


@pytest.mark.parametrize("settings", [{"target_modules": ["q_proj", "v_proj"]}, EXPERTS], ids=["attention", "experts"])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_mixture_of_experts(name: str, settings: dict[str, object], tmp_path: Path) -> None:
    """Its checkpoint holds every expert apart; the model has them fused."""
    base, adapter, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    model = make_moe(name)
    model.save_pretrained(base)
    save_peft(adapter, model, use_rslora=True, **settings)
    result = export("merged", base, adapter, "-o", merged)
    assert result.exit_code == 0, result.output
    with safe_open(base / "model.safetensors", "pt") as before, safe_open(merged / "model.safetensors", "pt") as after:
        assert set(after.keys()) == set(before.keys())
    merged_model, loading = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    expected = peft_logits(base, adapter)
    assert relative_error(logits_of(merged_model), expected) < ROUNDING
    assert relative_error(logits_of(AutoModelForCausalLM.from_pretrained(base)), expected) > 0.01


def test_experts_are_refused_where_they_cannot_be_held(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = make_moe("qwen3_moe")
    model.save_pretrained(base)
    save_peft(adapter, model, use_rslora=True, **EXPERTS)
    result = export("gguf", base, adapter, "-o", tmp_path / "a.gguf")
    assert result.exit_code == 1
    assert "adapts fused experts" in error_line(result.stderr)
    plain = tmp_path / "plain"
    assert export("peft", base, adapter, "-o", plain, "--plain-scaling").exit_code == 0
    assert relative_error(peft_logits(base, plain), peft_logits(base, adapter)) < ROUNDING


def test_ranks_and_alphas_of_single_layers(tmp_path: Path) -> None:
    base, adapter, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"1.mlp.up_proj": 32}}
    save_peft(adapter, save_base(base), **patterns)
    assert export("merged", base, adapter, "-o", merged).exit_code == 0
    assert (
        relative_error(logits_of(AutoModelForCausalLM.from_pretrained(merged)), peft_logits(base, adapter)) < ROUNDING
    )


def test_shards_stay_shards(tmp_path: Path) -> None:
    base, adapter, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    save_peft(adapter, save_base(base, max_shard_size="30KB"))
    assert export("merged", base, adapter, "-o", merged).exit_code == 0
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert index == json.loads((base / "model.safetensors.index.json").read_text()) | {"metadata": index["metadata"]}
    assert (
        relative_error(logits_of(AutoModelForCausalLM.from_pretrained(merged)), peft_logits(base, adapter)) < ROUNDING
    )


def test_adapted_output_embedding_leaves_the_tied_input_embedding(tmp_path: Path) -> None:
    base, adapter, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    save_peft(adapter, save_base(base, "gemma2"), target_modules=["lm_head", "q_proj"])
    assert export("merged", base, adapter, "-o", merged).exit_code == 0
    model, loading = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    assert not loading["unexpected_keys"]  # such as the frozen lm_head that PEFT saves beside its factors
    original = AutoModelForCausalLM.from_pretrained(base)
    assert torch.equal(model.get_input_embeddings().weight, original.get_input_embeddings().weight)
    assert not torch.equal(model.lm_head.weight, original.lm_head.weight)
    assert relative_error(logits_of(model), peft_logits(base, adapter)) < ROUNDING


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_dtype_of_the_weights(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The sum is made in fp32 and rounded once."""
    base, adapter, merged, exact = (tmp_path / part for part in ("base", "adapter", "merged", "exact"))
    save_peft(adapter, save_base(base))
    assert export("merged", base, adapter, "-o", exact).exit_code == 0
    assert export("merged", base, adapter, "-o", merged, "--dtype", name).exit_code == 0
    with safe_open(exact / "model.safetensors", "pt") as fp32, safe_open(merged / "model.safetensors", "pt") as half:
        for key in fp32.keys():  # noqa: SIM118
            assert torch.equal(half.get_tensor(key), fp32.get_tensor(key).to(dtype)), key
    assert AutoModelForCausalLM.from_pretrained(merged, dtype="auto").dtype == dtype


def test_another_base_is_refused_by_fingerprint(tiny_model: Path, tmp_path: Path, initialised: Path) -> None:
    other = tmp_path / "other"
    make_model("llama", torch.float32, seed=5).save_pretrained(other)
    before = content(tmp_path)
    result = export("merged", other, initialised, "-o", tmp_path / "merged")
    assert result.exit_code == 1
    assert "fingerprint" in error_line(result.stderr)
    assert content(tmp_path) == before
    assert export("merged", tiny_model, initialised, "-o", tmp_path / "merged").exit_code == 0
    assert export("merged", other, initialised, "-o", tmp_path / "other-merged", "--any-base").exit_code == 0


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"num_hidden_layers": 2}, "model.layers.2."), ({"intermediate_size": 40}, "has shape")],
)
def test_another_architecture_is_refused_by_names_and_shapes(
    changes: dict[str, int], told: str, tmp_path: Path, initialised: Path
) -> None:
    other = tmp_path / "other"
    make_model("llama", torch.float32, **changes).save_pretrained(other)
    result = export("merged", other, initialised, "-o", tmp_path / "merged", "--any-base")
    assert result.exit_code == 1
    assert told in error_line(result.stderr)
    assert not (tmp_path / "merged").exists()


def test_nothing_is_overwritten_unasked(tiny_model: Path, tmp_path: Path, initialised: Path) -> None:
    merged = tmp_path / "merged"
    assert export("merged", tiny_model, initialised, "-o", merged).exit_code == 0
    before = content(merged)
    result = export("merged", tiny_model, initialised, "-o", merged, "--dtype", "bf16")
    assert result.exit_code == 1
    assert "--overwrite" in error_line(result.stderr)
    assert content(merged) == before
    assert export("merged", tiny_model, initialised, "-o", merged, "--dtype", "bf16", "--overwrite").exit_code == 0
    assert content(merged) != before


def test_a_sum_that_overflows_names_the_layer(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = save_base(base)
    save_peft(adapter, model, lora_alpha=10**9, target_modules=["k_proj"])
    result = export("merged", base, adapter, "-o", tmp_path / "merged", "--dtype", "fp16")
    assert result.exit_code == 1
    assert "model.layers.0.self_attn.k_proj" in error_line(result.stderr)
    assert not (tmp_path / "merged").exists()


def test_dora_is_refused(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_peft(adapter, save_base(base), use_dora=True)
    result = export("merged", base, adapter, "-o", tmp_path / "merged")
    assert result.exit_code == 1
    assert "DoRA" in error_line(result.stderr)
