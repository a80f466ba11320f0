"""Tiny causal models, batches for them, and their reference losses and gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from loraone_init.layers.targets import is_conv1d

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


_SHARED_KEYS = {  # the last two of four blocks use the keys and values of the first two
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "sliding_window": 4,
}


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
    "gemma3n": lambda: Gemma3nTextConfig(
        **_SIZES | _SHARED_KEYS | {"intermediate_size": [48] * 4},
        altup_num_inputs=4,
        laurel_rank=4,
        activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
    ),
    "gemma4": lambda: Gemma4TextConfig(
        **_SIZES | _SHARED_KEYS, global_head_dim=8, num_global_key_value_heads=2, tie_word_embeddings=True
    ),
    "mistral": lambda: MistralConfig(**_SIZES, sliding_window=4),
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
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(5.0)
            if name.endswith("correct_output_scale"):  # Gemma 3n starts with 0, and layers without a gradient
                parameter.fill_(0.5)
    return model.to(dtype).eval()


class ChangesItsInput(nn.Module):
    """Its second block works in place."""

    class InPlace(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mul_(2.0)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(3, 3), self.InPlace()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x + 0.0)
        return x


def make_word_tokenizer(num_words: int = VOCABULARY - 3) -> PreTrainedTokenizerFast:
    """A word is a token: w0 has the id 3, w1 the id 4 ...; all others are unknown."""
    vocabulary = {"<pad>": 0, "</s>": 1, "?": 2} | {f"w{i}": i + 3 for i in range(num_words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>", unk_token="?")


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


def two_losses(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """The losses on `make_batches()` before and after one step; a second step is taken as well."""
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = reference_loss(model, make_batches())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


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
