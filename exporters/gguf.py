"""A LoRA adapter of llama.cpp: one GGUF file with every layer's factors under llama.cpp's names.

llama.cpp computes W·x + (α/r)·B·(A·x), whatever PEFT's configuration said of rsLoRA: the α written is s·r. A layer of
another s·r than the first has what is left of it in its B.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loraone_init.atomic import atomic_file
from loraone_init.errors import ExportError
from loraone_init.transformers_private import tied_parameters

from .base_model import BaseModel
from .lora_weights import LoraWeights
from .packages import require_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp has a model type of transformers.

    name: llama.cpp's for it.
    interleaved: rotary embeddings turn neighbouring rows of a head, not rows half a head apart: Q and K are permuted.
    """

    name: str
    interleaved: bool = False


ARCHITECTURES = {
    "arcee": Architecture("arcee", interleaved=True),
    "cohere": Architecture("command-r"),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2"),
    "gemma3_text": Architecture("gemma3"),
    "gpt2": Architecture("gpt2"),
    "granite": Architecture("granite", interleaved=True),
    "llama": Architecture("llama", interleaved=True),
    "mistral": Architecture("llama", interleaved=True),
    "mixtral": Architecture("llama", interleaved=True),
    "olmo": Architecture("olmo", interleaved=True),
    "olmo2": Architecture("olmo2"),
    "phi3": Architecture("phi3"),
    "qwen2": Architecture("qwen2"),
    "qwen2_moe": Architecture("qwen2moe"),
    "qwen3": Architecture("qwen3"),
    "qwen3_moe": Architecture("qwen3moe"),
    "smollm3": Architecture("smollm3", interleaved=True),
    "starcoder2": Architecture("starcoder2"),
}
"""Model types whose linear layers llama.cpp has as they are, but for the order of rows in Q and K."""


def export_gguf(base: BaseModel, lora: LoraWeights, output: Path) -> dict[str, Any]:
    """Write the file that llama.cpp's `--lora` takes, in fp32, whole or not at all.

    Raises ExportError where the architecture is not known, or llama.cpp has no such layer.
    """
    require_gguf()
    if lora.replacements:
        raise ExportError(
            f"{lora.path} replaces {next(iter(lora.replacements))}, which an adapter of llama.cpp cannot; export merged"
            " and convert that"
        )
    architecture = ARCHITECTURES.get(base.config.model_type)
    if architecture is None:
        raise ExportError(
            f"how llama.cpp has {base.config.model_type} is not known here, only {', '.join(ARCHITECTURES)}; export"
            " merged and convert that with llama.cpp's convert_hf_to_gguf.py"
        )
    names = _names(base, lora, architecture)
    alpha = next(lora.scales[module] * len(pair.A) for module, pair in lora.pairs.items()) or 1.0
    tensors = _tensors(names, lora, alpha, base.config if architecture.interleaved else None)
    with atomic_file(output) as temporary:
        _write(temporary, tensors, architecture.name, alpha)
    return {"layers": len(names), "architecture": architecture.name, "alpha": alpha}


def _names(base: BaseModel, lora: LoraWeights, architecture: Architecture) -> dict[str, str]:
    """llama.cpp's name of every layer's weight."""
    import gguf

    instead = "export merged and convert that with llama.cpp's convert_hf_to_gguf.py"
    shared = tied_parameters(base.module)
    tied = [module for module in lora.pairs if f"{module}.weight" in shared]
    if tied:
        raise ExportError(
            f"layer {tied[0]} is tied to the input embedding, and llama.cpp has no weight of its own for it; {instead}"
        )
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    known = gguf.get_tensor_name_map(arch, base.config.num_hidden_layers)
    names = {module: known.get_name(f"{module}.weight", try_suffixes=(".weight",)) for module in lora.pairs}
    if missing := [module for module, name in names.items() if name is None]:
        raise ExportError(
            f"llama.cpp does not have {len(missing)} of the {len(names)} layers of {lora.path} as they are, such as"
            f" {missing[0]}; {instead}"
        )
    return names


def _tensors(
    names: dict[str, str], lora: LoraWeights, alpha: float, interleave: PreTrainedConfig | None
) -> dict[str, torch.Tensor]:
    tensors = {}
    for module, name in names.items():
        pair = lora.pairs[module]
        B = pair.B.float() * (lora.scales[module] * len(pair.A) / alpha)
        tensors[f"{name}.lora_a"] = pair.A.float()
        tensors[f"{name}.lora_b"] = B if interleave is None else _interleave(module, B, interleave)
    return tensors


def _write(path: Path, tensors: dict[str, torch.Tensor], architecture: str, alpha: float) -> None:
    """The header is the gguf package's; the data are written here, since its writer does not notice a full disk."""
    import gguf

    arrays = {name: tensor.numpy().astype("<f4", order="C") for name, tensor in tensors.items()}
    writer = gguf.GGUFWriter(path, architecture)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for name, array in arrays.items():
            writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    with open(path, "ab") as file:
        for array in arrays.values():
            file.write(bytes(-file.tell() % writer.data_alignment))
            file.write(array.data)
        file.write(bytes(-file.tell() % writer.data_alignment))


def _interleave(module: str, B: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """B (out, r) of Q or K with rows i and i + d/2 of every head of size d beside each other; others as they are."""
    layer = module.rpartition(".")[2]
    if layer not in ("q_proj", "k_proj"):
        return B
    heads = config.num_attention_heads if layer == "q_proj" else config.num_key_value_heads
    halves: torch.Tensor = B.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)
