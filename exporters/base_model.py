"""The model an adapter belongs to: its directory, its checkpoint, and its modules without weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from loraone_init.errors import ExportError
from loraone_init.layers.targets import layer_shape
from loraone_init.models.foreign import load_config, told_as_model_error
from loraone_init.models.sources import LocalModel, resolve_model
from loraone_init.weights.checkpoint import Checkpoint
from loraone_init.weights.recipes import plain_names

from .expert_weights import separate_experts
from .lora_weights import LoraWeights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""The transformers class that opens a model, by PEFT's task type."""


@dataclass(frozen=True)
class BaseModel:
    """A model on disk.

    module: on the meta device: names, shapes and types, no numbers.
    """

    source: LocalModel
    checkpoint: Checkpoint
    module: PreTrainedModel
    auto_class: str
    trust_remote_code: bool = False

    @property
    def config(self) -> PreTrainedConfig:
        return self.module.config

    @cached_property
    def tensor_names(self) -> dict[str, str]:
        """The checkpoint's name for every parameter that it holds as the model does (fused experts it does not)."""
        return plain_names(self.module, self.checkpoint)


def open_base(
    model: str,
    lora: LoraWeights,
    *,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    any_base: bool = False,
    task_type: str | None = None,
) -> BaseModel:
    """Open `model` without its weights, and check that the adapter belongs to it.

    task_type: to open the model for; by default the adapter's.
    any_base: take a base with other weights than the adapter was made from; names and shapes have to fit anyway.
    Raises ModelError where it cannot be opened, ExportError where it is the wrong one.
    """
    source = resolve_model(model, revision=revision, token=token, trust_remote_code=trust_remote_code)
    checkpoint = Checkpoint(source.directory)
    task_type = task_type or lora.task_type or "CAUSAL_LM"
    if (auto_class := AUTO_CLASSES.get(task_type)) is None:
        raise ExportError(f"{lora.path}: task type {task_type} is not known; known are {', '.join(AUTO_CLASSES)}")
    module = _skeleton(source, auto_class, trust_remote_code, len(checkpoint.names))
    base = BaseModel(source, checkpoint, module, auto_class, trust_remote_code)
    _check_layers(base, separate_experts(module, lora))
    if not any_base:
        _check_fingerprint(base, lora)
    return base


def _skeleton(source: LocalModel, auto_class: str, trust_remote_code: bool, num_tensors: int) -> PreTrainedModel:
    import transformers

    with told_as_model_error(f"{source.name} cannot be opened by {auto_class}"):
        config = load_config(source.directory, source.name, num_tensors, trust_remote_code)
        if getattr(config, "quantization_config", None) is not None:
            raise ExportError(f"{source.name} is quantized; export with the model it was made from")
        with torch.device("meta"):
            module: PreTrainedModel = getattr(transformers, auto_class).from_config(
                config, dtype=config.dtype or torch.float32, trust_remote_code=trust_remote_code
            )
    return module.eval()


def _check_layers(base: BaseModel, lora: LoraWeights) -> None:
    """Raise ExportError where the adapter's names or shapes are not the model's."""
    modules = dict(base.module.named_modules())
    missing = [name for name in lora.pairs if name not in modules]
    if missing:
        raise ExportError(
            f"{lora.path} does not belong to {base.source.name}: {len(missing)} of its {len(lora.pairs)} layers are not"
            f" in {type(base.module).__name__}, such as {missing[0]}"
        )
    for name, pair in lora.pairs.items():
        shape = (pair.B.shape[0], pair.A.shape[1])
        if layer_shape(modules[name]) != shape:
            raise ExportError(
                f"{lora.path} does not belong to {base.source.name}: its layer {name} has shape {shape}, the model's"
                f" {layer_shape(modules[name])}"
            )


def _check_fingerprint(base: BaseModel, lora: LoraWeights) -> None:
    found = base.checkpoint.fingerprint()
    if lora.fingerprint not in (None, found):
        name = (lora.record or {})["base"].get("name")
        raise ExportError(
            f"{lora.path} was made from other weights than those of {base.source.name}: fingerprint"
            f" {str(lora.fingerprint)[:12]}… of {name}, here {found[:12]}…; pass that model, or --any-base where the"
            " difference is meant (another dtype, say)"
        )
