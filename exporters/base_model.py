"""The model an adapter belongs to: its directory, its checkpoint, and its modules without weights."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from loraone_init.errors import ExportError, ModelError
from loraone_init.layers.targets import layer_shape
from loraone_init.models.foreign import load_config, told_as_model_error
from loraone_init.models.loading import missing_tensors
from loraone_init.models.sources import LocalModel, resolve_model
from loraone_init.transformers_private import tied_parameters
from loraone_init.weights.checkpoint import Checkpoint, same_weights
from loraone_init.weights.recipes import InseparableError, find_recipes, plain_names

from .expert_weights import separate_experts
from .lora_weights import LoraWeights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


logger = logging.getLogger(__name__)

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
    Raises ModelError where it cannot be opened or lacks tensors, ExportError where it is the wrong one.
    """
    source = resolve_model(model, revision=revision, token=token, trust_remote_code=trust_remote_code)
    checkpoint = Checkpoint(source.directory)
    task_type = task_type or lora.task_type or "CAUSAL_LM"
    if (auto_class := AUTO_CLASSES.get(task_type)) is None:
        raise ExportError(f"{lora.path}: task type {task_type} is not known; known are {', '.join(AUTO_CLASSES)}")
    module = _skeleton(source, lora, auto_class, trust_remote_code, len(checkpoint.names))
    base = BaseModel(source, checkpoint, module, auto_class, trust_remote_code)
    _check_layers(base, separate_experts(module, lora))
    _check_replacements(base, lora)
    _check_whole(base, lora)
    if not any_base:
        _check_fingerprint(base, lora)
    return base


def _skeleton(
    source: LocalModel, lora: LoraWeights, auto_class: str, trust_remote_code: bool, num_tensors: int
) -> PreTrainedModel:
    import transformers

    with told_as_model_error(f"{source.name} cannot be opened by {auto_class}"):
        config = load_config(source.directory, source.name, num_tensors, trust_remote_code)
        if getattr(config, "quantization_config", None) is not None:
            raise ExportError(f"{source.name} is quantized; export with the model it was made from")
        if lora.replacements and lora.labels:  # the head that the adapter holds may have other outputs
            config.id2label = dict(enumerate(lora.labels))
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


def _check_replacements(base: BaseModel, lora: LoraWeights) -> None:
    """Raise ExportError where a tensor that the adapter holds whole is none of the model's, or not of its shape."""
    state = base.module.state_dict()
    for name, tensor in (*lora.replacements.items(), *lora.frozen.items()):
        if name not in state:
            raise ExportError(
                f"{lora.path} holds {name}, which is no tensor of {type(base.module).__name__}; merge it with PEFT"
            )
        if tensor.shape != state[name].shape:
            raise ExportError(
                f"{lora.path} holds {name} of shape {tuple(tensor.shape)}, the model's is {tuple(state[name].shape)};"
                " pass a base with as many rows, such as one whose embedding was resized before the training"
            )
    for name, tensor in lora.frozen.items():
        stored = base.tensor_names.get(name) or base.tensor_names.get(tied_parameters(base.module).get(name, ""))
        if stored is None or not base.checkpoint.read(stored).to(tensor.dtype).equal(tensor):
            raise ExportError(f"{lora.path} holds {name} with other values than {base.source.name}; merge it with PEFT")


def _check_whole(base: BaseModel, lora: LoraWeights) -> None:
    """Raise ModelError where neither the checkpoint nor the adapter has one of the model's tensors."""
    state = base.module.state_dict()
    try:
        names = {target for recipe in find_recipes(base.module, base.checkpoint) for target in recipe.targets}
    except InseparableError as error:
        raise ModelError(f"whether {base.source.name} is whole cannot be told: {error}") from error
    if missing := missing_tensors(base.module, names | lora.replacements.keys()):
        raise ModelError(
            f"the checkpoint of {base.source.name} lacks {len(missing)} tensors of {type(base.module).__name__}, such"
            f" as {missing[0]}, and the adapter does not hold them; does config.json belong to these weights?"
        )
    for name, stored in base.tensor_names.items():
        if name not in lora.replacements and base.checkpoint.shape(stored) != state[name].shape:
            raise ModelError(
                f"tensor {stored} of {base.source.name} has shape {tuple(base.checkpoint.shape(stored))}, the model"
                f" expects {tuple(state[name].shape)}; does config.json belong to these weights?"
            )


def _check_fingerprint(base: BaseModel, lora: LoraWeights) -> None:
    if lora.fingerprint is None:
        return
    found = base.checkpoint.fingerprint()
    same = same_weights(lora.fingerprint, found)
    if same is None:
        logger.warning(
            "%s has a fingerprint of an older kind, which is not compared: names and shapes alone tell that it belongs"
            " to %s",
            lora.path,
            base.source.name,
        )
    elif not same:
        name = (lora.record or {})["base"].get("name")
        raise ExportError(
            f"{lora.path} was made from other weights than those of {base.source.name}: fingerprint"
            f" {_short(lora.fingerprint)} of {name}, here {_short(found)}; pass that model, or --any-base where the"
            " difference is meant (another dtype, say)"
        )


def _short(fingerprint: str) -> str:
    return f"{fingerprint.rpartition(':')[2][:12]}…"
