"""The dtype that a model is computed in, and that of each of its tensors."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal, get_args

import torch

from ..errors import ConfigError
from ..transformers_private import dtype_plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


DType = Literal["auto", "float32", "bfloat16", "float16", "float64"]


def declared_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The parameters that transformers keeps in a dtype other than `dtype` (T5's `wo` in fp16), with their dtype."""
    plan = dtype_plan(model, dtype)
    return {
        name: kept for name, _ in model.named_parameters() for pattern, kept in plan.items() if re.search(pattern, name)
    }


def select_dtype(dtype: DType, device: torch.device) -> torch.dtype | None:
    """None: the checkpoint's own."""
    if dtype not in get_args(DType):
        raise ConfigError(f"dtype must be one of {', '.join(get_args(DType))}, got {dtype!r}")
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else None
    selected: torch.dtype = getattr(torch, dtype)
    return selected
