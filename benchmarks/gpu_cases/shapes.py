"""Model shapes, their random checkpoints, and the rows: all made here, nothing is downloaded."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig


@dataclass(frozen=True)
class Shape:
    """A Llama, and the rows it is given."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    length: int
    row_counts: tuple[int, ...]
    rank: int

    @property
    def block_parameters(self) -> int:
        """Of the linear layers of all blocks."""
        return self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.intermediate)

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=4096,
            dtype="bfloat16",
        )


LLAMA_2_7B = Shape("llama-2-7b", 4096, 11008, 32, 32, 32000, 1024, (8, 64), 8)
SMALL = Shape("small", 64, 96, 3, 4, 256, 32, (4,), 4)


def make_checkpoint(shape: Shape, directory: Path, device: str) -> None:
    """A random bf16 checkpoint, one shard for each block, on disk when this returns; one that is whole is kept."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return
    directory.mkdir(parents=True, exist_ok=True)
    config = shape.config()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    shards: dict[str, list[str]] = defaultdict(list)
    for name in shapes:
        parts = name.split(".")
        shards[".".join(parts[:3]) if parts[1] == "layers" else "rest"].append(name)
    generator = torch.Generator(device).manual_seed(0)
    where = {}
    for number, names in enumerate(shards.values(), start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: _weights(name, shapes[name], generator) for name in names}, directory / file, {"format": "pt"})
        with open(directory / file, "rb") as written:
            os.fsync(written.fileno())
        where |= dict.fromkeys(names, file)
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))


def _weights(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    drawn = torch.empty(shape, dtype=torch.bfloat16, device=generator.device).normal_(0.0, 0.02, generator=generator)
    return drawn.cpu()


def drop_from_cache(directory: Path) -> None:
    """Have the checkpoint read from the disk next time, where the system lets one ask for that."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in directory.glob("*.safetensors"):
        with open(file, "rb") as shard:
            os.posix_fadvise(shard.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make_rows(shape: Shape, rows: int) -> torch.Tensor:
    """Token ids (rows, length), frequent ones more often than rare ones, as in text; all are trained on."""
    generator = torch.Generator().manual_seed(1)
    frequency = 1.0 / torch.arange(1, shape.vocabulary + 1, dtype=torch.float64)
    return torch.multinomial(frequency, rows * shape.length, replacement=True, generator=generator).view(rows, -1)


def make_batches(shape: Shape, rows: int, rows_together: int) -> list[dict[str, torch.Tensor]]:
    return [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        for ids in make_rows(shape, rows).split(rows_together)
    ]
