"""What a classifier has on top of its base model: which modules, which of them a checkpoint lacks, how those start."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..data.labels import Labels, LabelSource, config_labels, names_labels
from ..errors import ModelError
from ..linalg.seeding import layer_generator
from ..tasks import task_of_module
from ..weights.base import get_tensor, set_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

_STANDARD_DEVIATION = 0.02  # where the configuration has no initializer_range


@dataclass(frozen=True)
class Head:
    """What a classifier has beside its base model; nothing, for models that are no classifiers.

    modules: the children around the base model that have weights, such as `classifier` or `score`.
    lacking: of these and of the base model's pooler, those of which the checkpoint has no tensor; poolers first.
    """

    modules: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()

    @property
    def saved(self) -> tuple[str, ...]:
        """What the adapter holds as a whole."""
        return tuple(dict.fromkeys((*self.lacking, *self.modules)))

    @property
    def is_new(self) -> bool:
        """Whether a part of the head itself has to be drawn."""
        return bool(set(self.modules) & set(self.lacking))

    def will_draw(self, tensor: str) -> bool:
        """Whether `draw_modules` makes this tensor."""
        return tensor.startswith(tuple(f"{module}." for module in self.lacking))


def find_head(model: nn.Module, names: Collection[str] | None = None) -> Head:
    """names: of a checkpoint's tensors, where a base model's have no prefix; None: the model has all of its weights."""
    if task_of_module(model) != "sequence-classification":
        return Head()
    prefix = getattr(model, "base_model_prefix", None)
    modules = tuple(name for name, child in model.named_children() if name != prefix and _has_weights(child))
    if names is None:
        return Head(modules)
    base = f"{prefix or ''}."
    poolers = [name for name, module in model.named_modules() if name == f"{base}pooler" and _has_weights(module)]
    lacking = tuple(
        module
        for module in (*poolers, *modules)
        if not any(name.startswith((f"{module}.", f"{module.removeprefix(base)}.")) for name in names)
    )
    return Head(modules, lacking)


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def labels_of(model: nn.Module) -> Labels | None:
    """What a classifier's outputs stand for; None for models that are none."""
    return config_labels(model.config) if task_of_module(model) == "sequence-classification" else None


def fit_labels(model: nn.Module, found: LabelSource, head: Head) -> bool:
    """Settle in the model's configuration what its outputs are; True where it has to be made anew with as many.

    found: the data's; asked for where the checkpoint has no head and its configuration names no labels.
    Raises ModelError where nothing tells.
    """
    config: Any = model.config
    own = config_labels(config)
    if not head.is_new or names_labels(config):
        config.problem_type = own.problem
        return False
    if found is None:
        raise ModelError(
            "the checkpoint has no classification head, and its configuration names no labels; pass labels=, such as"
            " what loraone_init.data.read_labels finds"
        )
    found = found if isinstance(found, Labels) else found()
    config.problem_type = config.problem_type or found.problem
    outputs = ("LABEL_0",) if config.problem_type == "regression" else found.names
    config.id2label = dict(enumerate(outputs))
    config.label2id = {name: index for index, name in enumerate(outputs)}
    return len(outputs) != len(own.names)


def draw_modules(model: nn.Module, modules: Iterable[str], seed: int, device: torch.device) -> None:
    """Give modules that the checkpoint lacks their first weights, which depend on the seed and their names only.

    Matrices are drawn from N(0, initializer_range²), as transformers does; biases are 0, the scales of norms 1.
    """
    deviation = getattr(model.config, "initializer_range", None) or _STANDARD_DEVIATION
    for module in modules:
        for leaf, parameter in model.get_submodule(module).named_parameters():
            name = f"{module}.{leaf}"
            first = torch.full(parameter.shape, float(parameter.ndim == 1 and leaf.endswith("weight")))
            if parameter.ndim > 1:
                first.normal_(0.0, deviation, generator=layer_generator(seed, name))
            set_tensor(model, name, first.to(device=device, dtype=parameter.dtype))
        logger.info("The checkpoint has no %s: drawn from seed %d, and written into the adapter", module, seed)


def settle_padding(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Name a language model's padding token, if it has none: as a classifier it reads the last token before that."""
    config: Any = model.config
    if task_of_module(model) != "sequence-classification" or tokenizer is None or config.pad_token_id is not None:
        return
    config.pad_token_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), None)
    logger.info(
        "The model names no padding token: %s is used; in training set config.pad_token_id", config.pad_token_id
    )


def saved_tensors(model: nn.Module, modules: Iterable[str]) -> Mapping[str, Mapping[str, torch.Tensor]]:
    """Copies of the modules' weights in fp32 on the CPU, by module and name in it."""
    return {
        module: {
            leaf: get_tensor(model, f"{module}.{leaf}").detach().float().cpu().clone()
            for leaf, _ in model.get_submodule(module).named_parameters()
        }
        for module in modules
    }
