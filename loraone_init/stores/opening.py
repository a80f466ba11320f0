"""What a model needs before a store can take its blocks: a reader of its checkpoint, and all else on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..checkpoint import Checkpoint
from ..recipes import InseparableError, crossing, find_recipes
from .reader import WeightReader

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def find_reader(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    blocks: list[str],
    resolve_ties: Callable[[PreTrainedModel, set[str]], dict[str, str]],
) -> tuple[WeightReader | None, str | None]:
    """What reads the checkpoint block by block, or why nothing does.

    resolve_ties: from the names that the checkpoint has to {tensor that it lacks: the one it is tied to}.
    """
    try:
        recipes = find_recipes(model, checkpoint)
    except InseparableError as error:
        return None, str(error)
    reader = WeightReader(model, checkpoint, recipes)
    tied = [name for pair in resolve_ties(model, reader.names).items() for name in pair]
    inside = tuple(f"{block}." for block in blocks)
    shared = crossing(recipes, blocks) or next((name for name in tied if name.startswith(inside)), None)
    return (reader, None) if shared is None else (None, f"{shared} is stored together with tensors of other blocks")


def move_present(model: nn.Module, device: torch.device) -> None:
    """To `device`, all parameters and buffers that are not on the meta device; tied ones stay tied."""
    for parameter in model.parameters():
        if not parameter.is_meta:
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[leaf] = buffer.to(device)
