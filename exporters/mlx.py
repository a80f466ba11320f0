"""An adapter directory of mlx-lm: lora_a = Aᵀ (in, r), lora_b = Bᵀ (r, out), y = W·x + scale·(x·lora_a)·lora_b.

mlx-lm has one rank and one scale for all layers. Where an adapter has several, smaller factors are filled up with
zeros, and what is left of a layer's scale goes into its lora_b: the product stays the same.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn.functional import pad

from loraone_init.atomic import atomic_directory
from loraone_init.errors import ExportError, describe

from .base_model import BaseModel
from .lora_weights import LoraWeights
from .packages import require_mlx

logger = logging.getLogger(__name__)

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"


def export_mlx(base: BaseModel, lora: LoraWeights, output: Path) -> dict[str, Any]:
    """Write the directory that mlx-lm's `--adapter-path` takes, whole or not at all.

    Raises ExportError where mlx-lm does not know the architecture, or has other layers than the adapter.
    """
    require_mlx()
    if lora.replacements:
        raise ExportError(
            f"{lora.path} replaces {next(iter(lora.replacements))}, which an adapter of mlx-lm cannot; export merged"
        )
    model = _open(base)
    _check_layers(model, lora, base)
    _compare_rotary_base(model, base)
    keys, num_layers = _keys(model, set(lora.pairs))
    tensors, rank, scale = _factors(lora)
    config = {
        "model": base.source.name,
        "fine_tune_type": "lora",
        "num_layers": num_layers,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys},
    }
    with atomic_directory(output) as directory:
        save_file(tensors, directory / WEIGHTS, metadata={"format": "mlx"})
        (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return {"layers": len(lora.pairs), "rank": rank, "scale": scale}


def _open(base: BaseModel) -> Any:
    """The model as mlx-lm has it; being lazy, it reads no weights."""
    from mlx_lm.utils import load_model

    try:
        model, _ = load_model(base.source.directory, lazy=True)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ExportError(
            f"mlx-lm cannot open {base.source.name}: {describe(error)[:250]}; export merged, gguf or onnx instead"
        ) from error
    return model


def _check_layers(model: Any, lora: LoraWeights, base: BaseModel) -> None:
    from mlx import nn

    modules = dict(model.named_modules())
    for name, pair in lora.pairs.items():
        shape = (pair.B.shape[0], pair.A.shape[1])
        module = modules.get(name)
        found = "is missing" if module is None else f"is {type(module).__name__}"
        if isinstance(module, nn.Linear):
            found = f"has shape {tuple(module.weight.shape)}"
            if tuple(module.weight.shape) == shape:
                continue
        raise ExportError(
            f"layer {name} {shape} of {lora.path} {found} in mlx-lm's {base.config.model_type}; export merged instead"
        )


def _compare_rotary_base(model: Any, base: BaseModel) -> None:
    """The adapter is right all the same, but the user would blame it."""
    wanted = _rotary_base(getattr(base.config, "rope_parameters", None) or {})
    found = getattr(model.args, "rope_theta", wanted)
    if wanted is not None and found != wanted:
        logger.warning(
            "mlx-lm takes the rotary base of %s for %g, it is %g: it looks for rope_theta in config.json, which"
            " transformers 5 writes into rope_parameters; add it there before you run the model with mlx-lm",
            base.source.name,
            found,
            wanted,
        )


def _rotary_base(parameters: Mapping[str, Any]) -> float | None:
    """The one that mlx-lm looks for: where each kind of attention has its own (Gemma 3), that of full attention."""
    inner = parameters.get("full_attention")
    found = (inner if isinstance(inner, Mapping) else parameters).get("rope_theta")
    return found if isinstance(found, int | float) else None


def _keys(model: Any, adapted: set[str]) -> tuple[list[str], int]:
    """The layers' names as mlx-lm's configuration has them, and of how many blocks, counted from the last.

    Names within a block, where the last blocks are adapted alike and all others not at all; else full names.
    """
    paths = {id(module): name for name, module in model.named_modules()}
    prefixes = [f"{paths[id(block)]}." for block in model.layers]
    by_block = [{name.removeprefix(p) for name in adapted if name.startswith(p)} for p in prefixes]
    last = by_block[-1]
    alike = sum(names == last for names in by_block)
    if last and all(names == last for names in by_block[-alike:]) and alike * len(last) == len(adapted):
        return sorted(last), alike
    return sorted(adapted), len(by_block)


def _factors(lora: LoraWeights) -> tuple[dict[str, torch.Tensor], int, float]:
    """mlx-lm's tensors, and the rank and scale of all."""
    rank = max(len(pair.A) for pair in lora.pairs.values())
    scale = max(lora.scales.values()) or 1.0
    tensors = {}
    for name, pair in lora.pairs.items():
        missing = rank - len(pair.A)
        B = pair.B if lora.scales[name] == scale else pair.B * (lora.scales[name] / scale)
        tensors[f"{name}.lora_a"] = pad(pair.A, (0, 0, 0, missing)).T.contiguous()
        tensors[f"{name}.lora_b"] = pad(B, (0, missing)).T.contiguous()
    return tensors, rank, scale
