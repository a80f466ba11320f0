"""Tiny models as GGUF files in fp32, and what llama.cpp answers with and without an adapter."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

from loraone_init.exporters.gguf import ARCHITECTURES
from loraone_init.layers.targets import is_conv1d


def write_model(path: Path, model: PreTrainedModel) -> None:
    """As llama.cpp's own converter lays out Llama, Qwen3 and GPT-2, without a tokenizer."""
    config, architecture = model.config, ARCHITECTURES[model.config.model_type]
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", 4 * config.hidden_size))
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(head_size)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    else:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    modules = dict(model.named_modules())
    for name, tensor in model.state_dict().items():
        module = modules[name.rpartition(".")[0]]
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if is_conv1d(module) and tensor.ndim == 2:
            tensor = tensor.T
        if architecture.interleaved and ".q_proj." in name:
            tensor = _interleaved(tensor, config.num_attention_heads)
        if architecture.interleaved and ".k_proj." in name:
            tensor = _interleaved(tensor, kv_heads)
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(tensor.float().numpy())
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(W: torch.Tensor, heads: int) -> torch.Tensor:
    size = len(W) // heads
    order = [head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return W[order]


def llama_cpp_logits(model: Path, ids: list[int], adapter: Path | None = None) -> torch.Tensor:
    """(tokens, vocabulary), from llama.cpp itself."""
    from llama_cpp import Llama

    llama = Llama(
        str(model),
        lora_path=None if adapter is None else str(adapter),
        n_ctx=64,
        type_k=gguf.GGMLQuantizationType.F32,  # of the cache; fp16 would be its error
        type_v=gguf.GGMLQuantizationType.F32,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        verbose=False,
    )
    llama.eval(ids)
    return torch.from_numpy(np.array(llama.scores[: len(ids)], dtype=np.float32))
