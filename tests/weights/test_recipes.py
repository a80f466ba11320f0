"""Checkpoints whose tensors are named or stored otherwise than the model's are read block by block all the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GPT2Config,
    GPT2Model,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)
from transformers.core_model_loading import Concatenate

from loraone_init import open_model
from loraone_init.weights.disk import DiskStore
from loraone_init.weights.host import HostStore

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "num_experts_per_tok": 2,
}
NUM_EXPERTS = 12  # more than ten: names are in the order of numbers, not of letters
FUSED: dict[str, PreTrainedConfig] = {
    "mixtral": MixtralConfig(**_SIZES, num_local_experts=NUM_EXPERTS),
    "qwen3-moe": Qwen3MoeConfig(**_SIZES, num_experts=NUM_EXPERTS, moe_intermediate_size=16),
    "deepseek-v3": DeepseekV3Config(
        **{**_SIZES, "num_key_value_heads": 4},
        n_routed_experts=NUM_EXPERTS,
        moe_intermediate_size=16,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
}


@pytest.fixture(params=FUSED)
def fused(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint with one tensor for each expert; the model has one for all."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FUSED[request.param]).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert any(".experts.11." in name for name in file.keys())  # noqa: SIM118
    return tmp_path


def weights_of(opened) -> dict[str, torch.Tensor]:
    """All of the model's tensors, each block's from its store."""
    found = dict(opened.module.state_dict())
    for block in opened.blocks:
        with opened.store.loaded(block):
            state = opened.module.state_dict()
            found |= {name: tensor.clone() for name, tensor in state.items() if name.startswith(f"{block}.")}
    return found


@pytest.mark.parametrize("placement", ["disk", "host", "device"])
def test_fused_experts_equal_from_pretrained_bit_for_bit(fused: Path, placement) -> None:
    opened = open_model(str(fused), placement=placement)
    assert opened.placement == placement
    found, truth = weights_of(opened), AutoModelForCausalLM.from_pretrained(fused, dtype=torch.float32).state_dict()
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[name], truth[name]) for name in truth)


def test_a_block_of_experts_reads_its_own_tensors_only(fused: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loraone_init.weights.checkpoint import Checkpoint

    opened, read, names = open_model(str(fused)), Checkpoint.read, []
    monkeypatch.setattr(Checkpoint, "read", lambda self, name, *rest: names.append(name) or read(self, name, *rest))
    with opened.store.loaded(opened.blocks[1]):
        pass
    assert isinstance(opened.store, DiskStore)
    assert names
    assert all(".layers.1." in name for name in names)
    assert len(names) == len(set(names))


def test_what_cannot_be_converted_alone_is_held_on_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FUSED["mixtral"]).save_pretrained(tmp_path)
    truth = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    convert = Concatenate.convert

    def needs_the_whole_model(self, input_dict, **options):
        if any(tensor.is_meta for tensor in input_dict.values()):
            raise ValueError("needs all layers")
        return convert(self, input_dict, **options)

    monkeypatch.setattr(Concatenate, "convert", needs_the_whole_model)
    opened = open_model(str(tmp_path), placement="disk")
    assert isinstance(opened.store, HostStore)
    assert opened.placement == "host"
    assert "Placement: host (not disk: model.layers.0.mlp.experts.gate_up_proj is not converted alone" in caplog.text
    found = weights_of(opened)
    assert all(torch.equal(found[name], truth[name]) for name in truth)


@pytest.mark.parametrize("placement", ["disk", "host"])
def test_a_base_models_checkpoint_with_a_head(placement, tmp_path: Path) -> None:
    """Names without the prefix that the model with a head gives them, and a head that is tied."""
    torch.manual_seed(0)
    GPT2Model(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)).save_pretrained(tmp_path)
    opened = open_model(str(tmp_path), placement=placement)
    found, truth = weights_of(opened), AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[name], truth[name]) for name in truth)
    assert opened.module.lm_head.weight is opened.module.transformer.wte.weight
