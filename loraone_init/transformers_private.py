"""Everything that this package uses of transformers without a promise that it stays, in one place.

No other file uses such a name, but for `training.callbacks`, which overrides `Trainer._save_checkpoint`. pyproject.toml
bounds transformers' version on account of this file: whoever raises the bound goes through the functions below. "Since"
tells a release that has the name, the first one as far as it was looked up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_checkpointing_layer(module: nn.Module) -> bool:
    """Whether it is a `modeling_layers.GradientCheckpointingLayer`, the base of a model's repeated layers, since 4.52.

    By name, so that transformers need not be imported for a model that does not come from it.
    """
    return any(base.__name__ == "GradientCheckpointingLayer" for base in type(module).__mro__)


def unsplit_classes(model: nn.Module) -> set[str]:
    """Names of the classes that must stay on one device, a model's blocks: `_no_split_modules`, since 4.20."""
    return set(getattr(model, "_no_split_modules", None) or ())


def dtype_plan(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Patterns of parameters that are kept in another dtype than `dtype`: `_get_dtype_plan`, since 5.1."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    return plan


def may_be_missing(model: PreTrainedModel) -> tuple[str, ...]:
    """Patterns of tensors that a checkpoint need not have: `_keys_to_ignore_on_load_missing`, since 4.0."""
    return tuple(model._keys_to_ignore_on_load_missing or ())


def tied_parameters(model: PreTrainedModel) -> dict[str, str]:
    """{parameter: the one whose tensor it shares}, in all parts of the model: `all_tied_weights_keys`, since 5.0."""
    pairs: dict[str, str] = model.all_tied_weights_keys
    return pairs


def initialize(owner: PreTrainedModel, module: nn.Module) -> None:
    """Give a module of `owner` the weights and buffers of a model that was never trained: `_init_weights`, since 2.0.

    Weights on the meta device stay there; buffers that are computed, not stored, are the model's own after it.
    """
    with torch.no_grad():
        owner._init_weights(module)


def encoder_output(states: torch.Tensor) -> Any:
    """What an encoder returns, whatever else models read of it being None: `modeling_outputs.BaseModelOutput`."""
    from transformers.modeling_outputs import BaseModelOutput

    class EncoderOutput(BaseModelOutput):  # type: ignore[misc]
        def __getattr__(self, name: str) -> None:
            if name.startswith("_"):
                raise AttributeError(name)

    return EncoderOutput(last_hidden_state=states)


EXPERTS_INTERFACE = ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate")
"""What the decorator `integrations.moe.use_experts_implementation` gives a module of fused experts, since 5.0."""


def apply_gate(experts: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The activation between the two products of fused experts with a gate: `_apply_gate`, since 5.0."""
    gated: torch.Tensor = experts._apply_gate(hidden)
    return gated


@dataclass(frozen=True)
class Conversions:
    """How a model's tensors come from a checkpoint's: `conversion_mapping` and `core_model_loading`, since 5.0.

    renamings:  steps that give a tensor another name.
    converters: steps that put several tensors together, or cut one, such as those of all experts.
    """

    renamings: Sequence[Any]
    converters: Sequence[Any]

    def target(
        self, name: str, model: PreTrainedModel, state: Mapping[str, torch.Tensor]
    ) -> tuple[str, str | None, Any]:
        """For a checkpoint's tensor: its name in the model, and the pattern and converter that take it, or None."""
        from transformers.core_model_loading import rename_source_key

        renamed, pattern = rename_source_key(name, self.renamings, self.converters, model.base_model_prefix, state)
        return renamed, pattern, None if pattern is None else self._by_pattern[pattern]

    @cached_property
    def _by_pattern(self) -> dict[str, Any]:
        return {pattern: converter for converter in self.converters for pattern in converter.source_patterns}


def conversions_of(model: PreTrainedModel) -> Conversions:
    """What transformers does to a checkpoint of this model while it loads it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    transforms = get_model_conversion_mapping(model)
    return Conversions(
        [transform for transform in transforms if isinstance(transform, WeightRenaming)],
        [transform for transform in transforms if isinstance(transform, WeightConverter)],
    )


def convert(
    converter: Any, target: str, sources: Iterable[tuple[str, str, torch.Tensor]], model: PreTrainedModel
) -> dict[str, torch.Tensor]:
    """Run one of `Conversions.converters` on a checkpoint's tensors: (name, pattern it matches, tensor). Since 5.0."""
    working = deepcopy(converter)  # it collects
    for name, pattern, tensor in sources:
        working.add_tensor(target, name, pattern, tensor)
    made = working.convert(target, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def as_stored(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors in the form that `save_pretrained` writes: `core_model_loading.revert_weight_conversion`, since 5.0."""
    from transformers.core_model_loading import revert_weight_conversion

    stored: dict[str, torch.Tensor] = revert_weight_conversion(model, tensors)
    return stored
