"""A layer smaller than the rank has the rank that its shape allows, and the scale of the others."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from support.causal import VOCABULARY, make_batches
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from loraone_init import Adapter, initialize
from loraone_init.errors import ConfigError

GATE = "model.layers.0.mlp.shared_expert_gate"
Q_PROJ = "model.layers.0.self_attn.q_proj"


def make_moe() -> Qwen2MoeForCausalLM:
    """Its shared expert has a gate with one output."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=16,
        num_experts=2,
        num_experts_per_tok=1,
    )
    return Qwen2MoeForCausalLM(config).eval()


@pytest.mark.parametrize("scaling", ["rslora", "lora"])
def test_peft_has_its_step(scaling, tmp_path):
    adapter = initialize(
        make_moe(), make_batches((9,)), rank=8, scaling=scaling, target_modules=["shared_expert_gate", "q_proj"]
    )
    assert adapter.ranks == {GATE: 1, Q_PROJ: 8}
    assert adapter.config.rank == 8
    adapter.save(tmp_path / "adapter")
    assert Adapter.load(tmp_path / "adapter").record() == adapter.record()
    peft = PeftModel.from_pretrained(make_moe(), tmp_path / "adapter")
    for name, pair in adapter.pairs.items():
        found = peft.get_submodule(f"base_model.model.{name}").get_delta_weight("default")
        assert found.norm() > 0
        torch.testing.assert_close(found, adapter.config.scale * pair.B @ pair.A)


def test_a_rank_larger_than_all_layers_is_refused():
    with pytest.raises(ConfigError, match=rf"rank 2 is larger than every layer allows, the largest being {GATE} of"):
        initialize(make_moe(), make_batches((9,)), rank=2, target_modules=["shared_expert_gate"])
