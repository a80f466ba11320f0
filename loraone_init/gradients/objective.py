"""The loss of a micro-batch, in two halves: the model up to its last block, and what follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import ConfigError, DataError, ModelError, describe, others_errors
from ..layers.patching import without_cache
from ..layers.sizes import text_config
from .losses import RowLosses

Batch = Mapping[str, torch.Tensor]
LossFunction = Callable[[nn.Module, Any], tuple[torch.Tensor, torch.Tensor | int]]


class Objective(Protocol):
    """What is differentiated: the sum of a batch's losses; the mean's 1/count is applied to the finished gradient."""

    @property
    def by_row(self) -> bool:
        """Whether the loss of a batch is the sum of its rows' losses, so that the batch may be divided by rows."""
        ...

    def check(self, batches: Sequence[Any]) -> None:
        """Raise DataError for batches that cannot be run, before any is."""
        ...

    def active(self) -> AbstractContextManager[None]:
        """A context around all `forward` calls of a pass."""
        ...

    def forward(self, batch: Any) -> Any:
        """Run the model on `batch` through its blocks; what `finish` needs."""
        ...

    def finish(self, features: Any, batch: Any, *, backward: bool, retain_graph: bool = True) -> RowLosses:
        """The losses; with `backward`, their sum is back-propagated to where `features` came from.

        retain_graph: whether that graph has to last, since blocks go back through parts of it later.
        """
        ...


class WholeModel:
    """Any model with any loss: `loss(model, batch)` gives the summed loss and the number of terms in it.

    Rows may depend on each other, as in a contrastive loss.
    """

    by_row = False

    def __init__(self, model: nn.Module, loss: LossFunction) -> None:
        self._model = model
        self._loss = loss

    def check(self, batches: Sequence[Any]) -> None:
        """Only the loss function knows what it can take."""

    def active(self) -> AbstractContextManager[None]:
        return without_cache(self._model)

    def forward(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor | int]:
        answer: Any = self._loss(self._model, batch)
        if not (isinstance(answer, tuple) and len(answer) == 2 and _is_scalar(answer[0]) and _is_scalar(answer[1])):
            raise ConfigError("the loss function has to return two numbers: the summed loss and how many terms it has")
        total, count = answer
        return torch.as_tensor(total), count

    def finish(
        self,
        features: tuple[torch.Tensor, torch.Tensor | int],
        batch: Any,
        *,
        backward: bool,
        retain_graph: bool = True,
    ) -> RowLosses:
        total, count = features
        if backward and total.requires_grad:
            torch.autograd.backward(total, retain_graph=retain_graph)
        return RowLosses(total.detach().double().cpu().reshape(1), torch.as_tensor(count).double().cpu().reshape(1))


@contextmanager
def model_runs(model: nn.Module) -> Iterator[None]:
    """Has what a model raises in here end as a ModelError: it may want an image beside the text, or sound."""

    def as_ours(error: Exception) -> ModelError:
        return ModelError(
            f"{type(model).__name__} does not run on these rows: {describe(error)[:300]}; does it read text alone?"
        )

    with others_errors(as_ours):
        yield


def check_tokens(model: nn.Module, sequences: Sequence[torch.Tensor]) -> None:
    """Raise DataError for a token or position that the model has no embedding for. sequences: (rows, tokens) each."""
    largest = max(int(tokens.max()) for tokens in sequences)
    longest = max(tokens.shape[1] for tokens in sequences)
    vocabulary, positions = _num_embeddings(model), _num_positions(model)
    if vocabulary is not None and largest >= vocabulary:
        raise DataError(
            f"the tokenizer gives token id {largest}, but the model has {vocabulary} embeddings; does the tokenizer"
            " belong to the model?"
        )
    if positions is not None and longest > positions:
        raise DataError(
            f"a row has {longest} tokens, but the model has {positions} positions; use `max_length={positions}`"
        )


def _num_embeddings(model: nn.Module) -> int | None:
    getter: Any = getattr(model, "get_input_embeddings", None)
    try:
        return getattr(getter(), "num_embeddings", None) if callable(getter) else None
    except NotImplementedError:  # models that have no such table
        return None


def _num_positions(model: nn.Module) -> int | None:
    """Learned positions; None for rotary ones, which go on beyond what the model was trained on."""
    config = text_config(model)
    if getattr(config, "rope_parameters", None) is not None:
        return None
    declared: int | None = getattr(config, "max_position_embeddings", None)
    if declared is not None and declared < 1:  # XLNet's way to say that there are none
        return None
    paddings = [
        getattr(module, "padding_idx", None)
        for name, module in model.named_modules()
        if name.endswith("position_embeddings")
    ]
    first = max((padding + 1 for padding in paddings if padding is not None), default=0)  # RoBERTa counts from there
    return None if declared is None else declared - first


def _is_scalar(value: Any) -> bool:
    return value.numel() == 1 if isinstance(value, torch.Tensor) else isinstance(value, (int, float))
