"""Reads a model's tensors from its checkpoint, as the model declares them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from .base import get_tensor, set_tensor
from .checkpoint import Checkpoint
from .recipes import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class WeightReader:
    """The tensors of `model` that `recipes` make of the checkpoint, by their names in the model.

    Shapes and dtypes are those that the model has when the reader is made.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint, recipes: Sequence[Recipe]) -> None:
        self._model = model
        self._checkpoint = checkpoint
        self._recipes = {target: recipe for recipe in recipes for target in recipe.targets}
        self._declared = {name: get_tensor(model, name) for name in self._recipes}
        self._declared = {name: torch.empty_like(tensor, device="meta") for name, tensor in self._declared.items()}

    @property
    def names(self) -> set[str]:
        return set(self._recipes)

    def declared(self, name: str) -> torch.Tensor:
        """A tensor's shape and dtype, on the meta device."""
        return self._declared[name]

    def inside(self, block: str) -> list[str]:
        """The names of a block's tensors."""
        return [name for name in self._recipes if name.startswith(f"{block}.")]

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The named tensors on the CPU, in the dtype that the model declares for them; one recipe's at a time.

        Raises ModelError where a tensor cannot be read, or has not the shape that the model expects.
        """
        left = dict.fromkeys(names)
        while left:
            recipe = self._recipes[next(iter(left))]
            for name, tensor in self._make(recipe).items():
                if name in left:
                    del left[name]
                    yield name, tensor.to(self._declared[name].dtype)

    def load(self, names: Iterable[str], device: torch.device) -> None:
        """Read the named tensors into the model."""
        for name, tensor in self.read(names):
            set_tensor(self._model, name, tensor.to(device))

    def _make(self, recipe: Recipe) -> dict[str, torch.Tensor]:
        shape = self._declared[recipe.targets[0]].shape if recipe.converter is None else None
        sources = [name for group in recipe.sources.values() for name in group]
        return recipe.run({name: self._checkpoint.read(name, shape) for name in sources}, self._model)
