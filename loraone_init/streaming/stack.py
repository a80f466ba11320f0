"""A model's blocks as a stack: how their calls are intercepted, and what holds their weights and inputs.

The stack can also be run as a whole, with all weights there: then it has no blocks that calls could stop at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import ModelError, ResourceError, is_out_of_memory
from ..layers.patching import replaced_forward
from ..machine import describe_size
from ..models.opening import OpenModel
from ..weights.base import WeightStore
from .changes import nothing_left_behind
from .coroutines import pause, running
from .keeping import Keeper
from .mappings import Written, as_dicts, run_with_mappings, write_back
from .modes import Modes


@dataclass(frozen=True)
class BlockRequest:
    """A micro-batch has arrived at a block."""

    block: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    context: Context = field(default_factory=copy_context)  # the model's own, which its hooks may read
    modes: Modes = field(default_factory=Modes.here)


class BlockStack:
    """A model's blocks, their own forwards, the store that holds their weights, and the keeper of what passes by.

    names:       of the blocks at which calls stop, in the order of the model; none while the model is run as a whole.
    most_tokens: of a micro-batch while the model is run as a whole; None sets no limit.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], store: WeightStore) -> None:
        self.model = model
        self.names = list(names)
        self.store = store
        self.keeper = Keeper()
        self._modules = [model.get_submodule(name) for name in names]
        self._forwards: list[Callable[..., Any]] = [module.forward for module in self._modules]
        self.most_tokens: int | None = None
        self._whole: ExitStack | None = None
        self._blocks = self.names

    @classmethod
    def of(cls, opened: OpenModel) -> BlockStack:
        """The stack of an opened model."""
        return cls(opened.module, opened.blocks, opened.store)

    @contextmanager
    def kept_by(self, keeper: Keeper) -> Iterator[None]:
        """Inside, what passes between blocks is kept by `keeper`."""
        before, self.keeper = self.keeper, keeper
        try:
            yield
        finally:
            self.keeper = before

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.parameters()).device

    @property
    def is_whole(self) -> bool:
        """Whether the model is run as a whole, and could be divided into its blocks."""
        return self._whole is not None and bool(self._blocks)

    @contextmanager
    def as_a_whole(self, most_tokens: int | None = None) -> Iterator[None]:
        """Inside, until `divide` is called, all weights are on the device and calls do not stop at blocks.

        most_tokens: of a micro-batch. Raises ResourceError where the weights do not fit.
        """
        with ExitStack() as weights:
            try:
                for block in range(len(self.names)):
                    weights.enter_context(self.loaded(block))
            except ResourceError as error:
                raise ResourceError('out of memory: all weights do not fit; use `schedule="blocks"`') from error
            self._whole, self.names, self.most_tokens = weights, [], most_tokens
            try:
                yield
            finally:
                self.divide()

    def divide(self) -> None:
        """Run the model block by block from now on, each block's weights there for as long as it needs them."""
        if self._whole is not None:
            weights, self._whole = self._whole, None
            self.names, self.most_tokens = self._blocks, None
            weights.close()

    @contextmanager
    def intercepted(self) -> Iterator[None]:
        """Inside, a call of a block pauses the running coroutine with a `BlockRequest`."""
        with ExitStack() as stack:
            for index, module in enumerate(self._modules):
                stack.enter_context(replaced_forward(module, partial(_request_block, index)))
            yield

    @contextmanager
    def loaded(self, block: int) -> Iterator[None]:
        """Inside, the block's weights are on the device. Raises ResourceError where they do not fit."""
        with ExitStack() as weights:
            try:
                weights.enter_context(self.store.loaded(self.names[block]))
            except (RuntimeError, MemoryError, OSError) as error:
                if not is_out_of_memory(error):
                    raise
                size = sum(tensor.nbytes for tensor in self._modules[block].parameters())
                raise ResourceError(
                    f"out of memory: the weights of {self.names[block]} need {describe_size(size)}, and those of the"
                    ' next block as much; free memory on the device, or use `placement="disk"`'
                ) from error
            yield

    def module(self, block: int) -> nn.Module:
        return self._modules[block]

    def run(self, block: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Written]:
        """The block's own forward: what it returns, and what it writes into dicts and lists that it is given.

        Raises ModelError where it changes anything else.
        """
        with nothing_left_behind(self.names[block], self._modules[block], args, kwargs):
            return run_with_mappings(self._forwards[block], args, kwargs)


def run_request(
    stack: BlockStack, request: BlockRequest, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Written]:
    """`stack.run` for that request, with the context variables and modes that the model had set where it called."""
    with request.modes.casting():
        return request.context.run(stack.run, request.block, args, kwargs)


def _request_block(block: int, *args: Any, **kwargs: Any) -> Any:
    if not running():
        raise ModelError("a block calls another block, so that they cannot be streamed; name the outer ones' list only")
    outputs, written = pause(BlockRequest(block, *as_dicts(args, kwargs)))
    write_back(args, kwargs, written)
    return outputs
