"""How each of a model's tensors comes from a checkpoint: under another name, or put together from several.

transformers' own conversion mapping says it: tensors are renamed, get or lose the base model's prefix, or go through
a converter, such as the one that stacks the weights of all experts. A recipe is one such step; it runs on its own
tensors alone, so that a block is read without the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import describe, is_out_of_memory
from ..transformers_private import conversions_of, convert
from .checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Recipe:
    """Tensors of the model that are made together.

    targets:   their names in the model.
    sources:   the checkpoint's names, by the converter's pattern that each matches; one alone where none converts.
    converter: of transformers; None: the one source is the one target.
    """

    targets: tuple[str, ...]
    sources: Mapping[str, tuple[str, ...]]
    converter: Any = None

    def run(self, tensors: Mapping[str, torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """The targets from the sources' tensors by name, in the checkpoint's dtype."""
        if self.converter is None:
            ((source,),) = self.sources.values()
            return {self.targets[0]: tensors[source]}
        return _convert(self.converter, self.targets[0], self.sources, tensors, model)


class InseparableError(Exception):
    """Tensors of the checkpoint cannot be converted block by block; the message says why."""


def find_recipes(model: PreTrainedModel, checkpoint: Checkpoint) -> list[Recipe]:
    """For every parameter and persistent buffer of `model` that the checkpoint holds, how to make it.

    Raises InseparableError where transformers' converter for some tensors does not work on these alone.
    """
    state = model.state_dict()
    plain: dict[str, Recipe] = {}
    groups: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    for name, target, pattern, converter in _matches(model, checkpoint, state):
        if converter is None:
            plain[target] = Recipe((target,), {name: (name,)})
        else:
            groups.setdefault(target, (converter, {}))[1].setdefault(pattern, []).append(name)
    converted = [
        _recipe(target, converter, {pattern: tuple(names) for pattern, names in sources.items()}, checkpoint, model)
        for target, (converter, sources) in groups.items()
    ]
    for recipe in converted:
        _check_shapes(recipe, checkpoint, model, state)
    return [*plain.values(), *converted]


def plain_names(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """The checkpoint's name for every parameter and persistent buffer of `model` that it holds as the model does."""
    matches = _matches(model, checkpoint, model.state_dict())
    return {target: name for name, target, _, converter in matches if converter is None}


def crossing(recipes: list[Recipe], blocks: Sequence[str]) -> str | None:
    """A tensor that is made together with one outside of its block; None: there is none."""
    for recipe in recipes:
        owners = {next((block for block in blocks if name.startswith(f"{block}.")), None) for name in recipe.targets}
        if len(owners) > 1:
            return recipe.targets[0]
    return None


def _matches(
    model: PreTrainedModel, checkpoint: Checkpoint, state: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, str, str, Any]]:
    """(checkpoint's name, first target, pattern, converter or None) of all tensors that the model wants."""
    conversions = conversions_of(model)
    for name in sorted(checkpoint.names, key=_natural):  # the experts' order: 2 before 10
        target, pattern, converter = conversions.target(name, model, state)
        if target not in state and name in state:
            target, pattern, converter = name, None, None
        if target in state:
            yield name, target, pattern or name, converter


def _natural(name: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _recipe(
    target: str,
    converter: Any,
    sources: Mapping[str, tuple[str, ...]],
    checkpoint: Checkpoint,
    model: PreTrainedModel,
) -> Recipe:
    made = _convert(converter, target, sources, _shapes(sources, checkpoint), model)
    first = [target] if target in made else []
    return Recipe((*first, *(name for name in made if name != target)), sources, converter)


def _convert(
    converter: Any,
    target: str,
    sources: Mapping[str, tuple[str, ...]],
    tensors: Mapping[str, torch.Tensor],
    model: PreTrainedModel,
) -> dict[str, torch.Tensor]:
    given = [(name, pattern, tensors[name]) for pattern, names in sources.items() for name in names]
    try:
        return convert(converter, target, given, model)
    except Exception as error:  # whatever a converter of some model may raise
        if is_out_of_memory(error):
            raise
        raise InseparableError(f"{target} is not converted alone: {describe(error)[:150]}") from error


def _check_shapes(
    recipe: Recipe, checkpoint: Checkpoint, model: PreTrainedModel, state: Mapping[str, torch.Tensor]
) -> None:
    for name, tensor in recipe.run(_shapes(recipe.sources, checkpoint), model).items():
        if name not in state or tensor.shape != state[name].shape:
            raise InseparableError(
                f"{name} is not converted alone: the model has no such tensor of {tuple(tensor.shape)}"
            )


def _shapes(sources: Mapping[str, tuple[str, ...]], checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The sources on the meta device: converting these shows what comes out, and reads nothing."""
    names = [name for group in sources.values() for name in group]
    return {name: torch.empty(checkpoint.shape(name), device="meta") for name in names}
