"""The loss of a micro-batch, in two halves: the model up to its last block, and what follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.functional import log_softmax

from .encoding import IGNORED
from .errors import ConfigError, DataError
from .patching import replaced_forward, without_cache

Batch = Mapping[str, torch.Tensor]
LossFunction = Callable[[nn.Module, Any], tuple[torch.Tensor, torch.Tensor | int]]

MAX_LOGITS = 2**22
"""Elements of the logits computed at a time (16 MiB in fp32); a few such buffers are alive together."""


@dataclass(frozen=True)
class RowLosses:
    """Summed losses and their counts (rows,), fp64 on the CPU; a custom loss counts as one row for each batch."""

    sums: torch.Tensor
    counts: torch.Tensor

    def followed_by(self, other: RowLosses) -> RowLosses:
        """Those of both, these rows first."""
        return RowLosses(torch.cat([self.sums, other.sums]), torch.cat([self.counts, other.counts]))


class Objective(Protocol):
    """What is differentiated: the sum of a batch's losses; the mean's 1/count is applied to the finished gradient."""

    def check(self, batches: Sequence[Any]) -> None:
        """Raise DataError for batches that cannot be run, before any is."""
        ...

    def active(self) -> AbstractContextManager[None]:
        """A context around all `forward` calls of a pass."""
        ...

    def forward(self, batch: Any) -> Any:
        """Run the model on `batch` through its blocks; what `finish` needs."""
        ...

    def finish(self, features: Any, batch: Any, *, backward: bool) -> RowLosses:
        """The losses; with `backward`, their sum is back-propagated to where `features` came from."""
        ...


class CausalLM:
    """Sum of next-token cross entropies over all label tokens, with the logits of the model's own head.

    Only positions that predict a label reach the head, in chunks of at most `MAX_LOGITS` logits, each
    back-propagated before the next. To run the head alone, the model's own forward is called with the decoder
    replaced by one that answers with the chunk of hidden states; so soft-capping and logit scaling are the model's.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model = model
        self._device = device
        getter = getattr(model, "get_decoder", None)
        decoder = getter() if callable(getter) else None
        self._decoder: nn.Module | None = decoder if decoder is not model else None
        self._original = self._decoder.forward if self._decoder is not None else None

    def check(self, batches: Sequence[Batch]) -> None:
        """Also a token or position that the model has no embedding for: a GPU would stop for good."""
        for number, batch in enumerate(batches, 1):
            lacking = [key for key in ("input_ids", "labels") if not isinstance(batch, Mapping) or key not in batch]
            if lacking:
                has = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
                raise DataError(f"batch {number} has no {' and no '.join(lacking)}, only {has}; or pass loss=")
        check_tokens(self._model, [batch["input_ids"] for batch in batches])

    @contextmanager
    def active(self) -> Iterator[None]:
        """While active, the model's forward ends where the decoder returns."""
        if self._decoder is None:
            yield
            return
        with replaced_forward(self._decoder, self._leave_with_output):
            yield

    def forward(self, batch: Batch) -> Any:
        """The decoder's output, hidden states (batch, tokens, hidden) in it; the logits if no decoder is known."""
        try:
            return self._model(**self._inputs(batch), use_cache=False, return_dict=True)
        except _DecoderReturned as reached:
            return reached.output

    def _inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {key: value.to(self._device) for key, value in batch.items() if key != "labels"}

    def _labels(self, batch: Batch) -> torch.Tensor:
        """What each position predicts."""
        return batch["labels"][:, 1:]

    def finish(self, features: Any, batch: Batch, *, backward: bool) -> RowLosses:
        labels = self._labels(batch).to(self._device)
        row, position = torch.nonzero(labels != IGNORED, as_tuple=True)
        target = labels[row, position]
        source = features.logits if self._decoder is None else _hidden_states(features)
        leaf = source.detach().requires_grad_(backward)
        losses = [
            self._finish_chunk(features, leaf, row[chunk], position[chunk], target[chunk], backward)
            for chunk in torch.arange(len(row)).split(self._chunk_length())
        ]
        if backward and source.requires_grad and leaf.grad is not None:
            torch.autograd.backward(source, leaf.grad, retain_graph=True)
        sums = torch.zeros(len(labels), dtype=torch.float64)
        sums.index_add_(0, row.cpu(), torch.cat(losses).cpu().double())
        return RowLosses(sums, torch.bincount(row.cpu(), minlength=len(labels)).double())

    def _finish_chunk(
        self,
        features: Any,
        leaf: torch.Tensor,
        row: torch.Tensor,
        position: torch.Tensor,
        target: torch.Tensor,
        backward: bool,
    ) -> torch.Tensor:
        """Cross entropies (n,) where `target` (n,) follows leaf[row, position]; with `backward`, their sum's gradient.

        That is softmax - onehot with respect to the logits, made in the place of their logarithms: two buffers of
        logits are alive, not the four of cross_entropy and its backward.
        """
        with torch.set_grad_enabled(backward):
            states = leaf[row, position][None]
            logits = states if self._decoder is None else self._head(features, states)
        log_p = log_softmax(_at_least_fp32(logits.detach()[0]), dim=-1)
        loss = -log_p.gather(1, target[:, None])[:, 0]
        if backward and logits.requires_grad:
            gradient = log_p.exp_()
            gradient[torch.arange(len(target), device=target.device), target] -= 1.0
            logits.backward(gradient[None].to(logits.dtype))
        return loss

    def _leave_with_output(self, *args: Any, **kwargs: Any) -> Any:
        assert self._original is not None
        raise _DecoderReturned(self._original(*args, **kwargs))

    def _head(self, features: Any, states: torch.Tensor) -> torch.Tensor:
        """Logits (1, n, vocabulary) of hidden states (1, n, hidden), by the model's own forward."""
        assert self._decoder is not None
        answer = _with_hidden_states(features, states)
        with replaced_forward(self._decoder, lambda *args, **kwargs: answer):
            logits: torch.Tensor = self._model(**self._head_inputs(states), use_cache=False, return_dict=True).logits
        return logits

    def _head_inputs(self, states: torch.Tensor) -> dict[str, Any]:
        """Tokens that no one reads, as many as there are states."""
        return {"input_ids": torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)}

    def _chunk_length(self) -> int:
        return max(1, MAX_LOGITS // getattr(_text_config(self._model), "vocab_size", MAX_LOGITS))


class WholeModel:
    """Any model with any loss: `loss(model, batch)` gives the summed loss and the number of terms in it."""

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

    def finish(self, features: tuple[torch.Tensor, torch.Tensor | int], batch: Any, *, backward: bool) -> RowLosses:
        total, count = features
        if backward and total.requires_grad:
            torch.autograd.backward(total, retain_graph=True)
        return RowLosses(total.detach().double().cpu().reshape(1), torch.as_tensor(count).double().cpu().reshape(1))


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
            f"a row has {longest} tokens, but the model has {positions} positions; use --max-length {positions}"
        )


class _DecoderReturned(BaseException):
    """Leaves a model's forward with its decoder's output. Not an Exception: model code must not swallow it."""

    def __init__(self, output: Any) -> None:
        self.output = output


def _text_config(model: nn.Module) -> Any:
    """The configuration of the language model, None for a module without one."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else None


def _num_embeddings(model: nn.Module) -> int | None:
    getter: Any = getattr(model, "get_input_embeddings", None)
    return getattr(getter(), "num_embeddings", None) if callable(getter) else None


def _num_positions(model: nn.Module) -> int | None:
    """Learned positions; None for rotary ones, which go on beyond what the model was trained on."""
    config = _text_config(model)
    if getattr(config, "rope_parameters", None) is not None:
        return None
    declared: int | None = getattr(config, "max_position_embeddings", None)
    paddings = [
        getattr(module, "padding_idx", None)
        for name, module in model.named_modules()
        if name.endswith("position_embeddings")
    ]
    first = max((padding + 1 for padding in paddings if padding is not None), default=0)  # RoBERTa counts from there
    return None if declared is None else declared - first


def _hidden_states(output: Any) -> torch.Tensor:
    states: torch.Tensor = output[0]
    return states


def _with_hidden_states(output: Any, states: torch.Tensor) -> Any:
    """A copy of a decoder's output with other hidden states in its place."""
    if isinstance(output, tuple):
        return (states, *output[1:])
    answer = copy(output)
    answer.last_hidden_state = states
    return answer


def _is_scalar(value: Any) -> bool:
    return value.numel() == 1 if isinstance(value, torch.Tensor) else isinstance(value, (int, float))


def _at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
