"""Tiny mixture-of-experts models, shared by tests."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen3-moe": lambda: Qwen3MoeConfig(**SIZES, moe_intermediate_size=16, num_experts=6, mlp_only_layers=[0]),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=5),
    "gpt-oss": lambda: GptOssConfig(**SIZES, num_local_experts=5),  # stored (experts, in, out), with biases
    "deepseek-v3": lambda: DeepseekV3Config(  # a dense layer first, and an expert that all tokens share
        **SIZES | _LATENT | {"num_key_value_heads": 4},
        moe_intermediate_size=16,
        n_routed_experts=5,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    ),
}
UNMET = 0
"""The expert of the last layer that no token is sent to."""


def make_moe(name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Two of four other experts, with opposite rows in the router, come before `UNMET` for any token."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), experts_implementation="eager")
    router = next(m for n, m in model.model.layers[-1].mlp.named_children() if n in ("gate", "router"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5.0)
        router.weight[UNMET] = 0.0
        router.weight[2], router.weight[4] = -router.weight[1], -router.weight[3]
        if getattr(router, "bias", None) is not None:
            router.bias.zero_()
    return model.to(dtype).eval()
