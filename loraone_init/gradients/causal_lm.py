"""The objective of causal language models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import Any

import torch
from torch import nn
from torch.nn.functional import log_softmax

from ..data.batches import IGNORED
from ..errors import DataError, ModelError, describe, others_errors
from ..layers.language import find_decoder
from ..layers.patching import only_last_states, replaced_forward
from ..layers.sizes import text_config
from .losses import RowLosses
from .objective import Batch, check_tokens, model_runs

MAX_LOGITS = 2**22
"""Elements of the logits computed at a time (16 MiB in fp32); a few such buffers are alive together."""


class CausalLM:
    """Sum of next-token cross entropies over all label tokens, with the logits of the model's own head.

    Only positions that predict a label reach the head, in chunks of at most `MAX_LOGITS` logits, each
    back-propagated before the next. To run the head alone, the model's own forward is called with the decoder
    replaced by one that answers with the chunk of hidden states; so soft-capping and logit scaling are the model's.
    """

    by_row = True

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._decoder = find_decoder(model)
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
        with ExitStack() as stack:
            stack.enter_context(only_last_states(self._model))
            if self._decoder is not None:
                stack.enter_context(replaced_forward(self._decoder, self._leave_with_output))
            yield

    def forward(self, batch: Batch) -> Any:
        """The decoder's output, hidden states (batch, tokens, hidden) in it; the logits if no decoder is known."""
        try:
            with model_runs(self._model):
                output = self._model(**self._inputs(batch), use_cache=False, return_dict=True)
        except _DecoderReturned as reached:
            self._check_read(reached.read, batch)
            return reached.output
        self._decoder = None  # it was not called: the model calls parts of it
        self._check_read(None, batch)
        return output

    def _inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {key: value.to(self._device) for key, value in batch.items() if key != "labels"}

    def _check_read(self, tokens: Any, batch: Batch) -> None:
        """Raise ModelError where the decoder was given other tokens than it should."""

    def _labels(self, batch: Batch) -> torch.Tensor:
        """What each position predicts."""
        return batch["labels"][:, 1:]

    def finish(self, features: Any, batch: Batch, *, backward: bool, retain_graph: bool = True) -> RowLosses:
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
            torch.autograd.backward(source, leaf.grad, retain_graph=retain_graph)
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
        read = kwargs.get("input_ids", args[0] if args else None)
        raise _DecoderReturned(self._original(*args, **kwargs), read)

    def _head(self, features: Any, states: torch.Tensor) -> torch.Tensor:
        """Logits (1, n, vocabulary) of hidden states (1, n, hidden), by the model's own forward."""
        assert self._decoder is not None
        answer = _with_hidden_states(features, states)
        with replaced_forward(self._decoder, lambda *args, **kwargs: answer), others_errors(self._not_alone):
            logits: torch.Tensor = self._model(**self._head_inputs(states), use_cache=False, return_dict=True).logits
        return logits

    def _not_alone(self, error: Exception) -> ModelError:
        name = type(self._model).__name__
        return ModelError(
            f"the head of {name} reads more than its decoder's last hidden states: {describe(error)[:250]}; pass loss="
        )

    def _head_inputs(self, states: torch.Tensor) -> dict[str, Any]:
        """Tokens that no one reads, as many as there are states."""
        return {"input_ids": torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)}

    def _chunk_length(self) -> int:
        return max(1, MAX_LOGITS // getattr(text_config(self._model), "vocab_size", MAX_LOGITS))


class _DecoderReturned(BaseException):
    """Leaves a model's forward with its decoder's output. Not an Exception: model code must not swallow it.

    read: the tokens that the decoder was given, if it was given tokens.
    """

    def __init__(self, output: Any, read: Any) -> None:
        self.output = output
        self.read = read


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


def _at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
