"""A model without storage, from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..data.labels import LabelSource
from ..tasks import NAMES, Task, check_architecture
from ..weights.base import get_tensor, set_tensor
from ..weights.checkpoint import Checkpoint
from .classes import make_on_meta
from .dtypes import DType, declared_dtypes, select_dtype
from .foreign import load_config, told_as_model_error
from .heads import Head, find_head, fit_labels
from .placement import Placement
from .quantized import check_dtype, quantization_method, require_packages
from .sources import LocalModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Wanted:
    """The options of `open_model` that say how."""

    device: torch.device
    dtype: DType
    trust_remote_code: bool
    placement: Placement
    max_memory: int | None
    weights: bool
    task: Task
    labels: LabelSource


def skeleton(source: LocalModel, checkpoint: Checkpoint, wanted: Wanted) -> tuple[PreTrainedModel, Head]:
    """The model without storage, and its head if it is a classifier.

    Every parameter and buffer is on the meta device, in the dtype it will have.
    """
    with told_as_model_error(f"{source.name} cannot be opened as {NAMES[wanted.task].kind}"):
        config = load_config(source.directory, source.name, len(checkpoint.names), wanted.trust_remote_code)
        check_architecture(source.name, config, wanted.task)
        model = _from_config(config, wanted)
        head = find_head(model, checkpoint.names)
        if wanted.task == "sequence-classification" and fit_labels(model, wanted.labels, head):
            model = _from_config(model.config, wanted)
    if method := quantization_method(model):
        check_dtype(source.name, method, model.dtype)
        if wanted.weights:
            require_packages(source.name, method)
    frozen: PreTrainedModel = model.eval().requires_grad_(False)
    for name, kept in declared_dtypes(frozen, frozen.dtype).items():
        set_tensor(frozen, name, get_tensor(frozen, name).to(kept))
    return frozen, head


def _from_config(config: Any, wanted: Wanted) -> PreTrainedModel:
    dtype = select_dtype(wanted.dtype, wanted.device) or config.dtype or torch.float32
    model: PreTrainedModel = make_on_meta(config, wanted.task, dtype, wanted.trust_remote_code)
    return model
