"""Run a model block by block: every micro-batch passes a block while its weights are there, then the next block.

The model's own forward runs once for each micro-batch, so that masks, positions and all glue between the blocks are
the model's. A block's call is intercepted: the driver computes it from detached inputs, which it keeps, and answers
with outputs that start a new graph. What remains between the blocks is a small autograd graph of glue for each
micro-batch, which holds no block's output. Backward goes through the blocks in reverse: compute again from the kept
inputs, back-propagate the outputs' gradients, hand those of the inputs to the glue, which adds them up at the earlier
outputs. Tensors that several blocks share (an encoder's output,
a position bias) need nothing special; what they share through a mapping does (see `mappings`).

One micro-batch is on the device at a time, with all that a `Keeper` has room for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from ..errors import ModelError, describe
from ..machine import trim_heap
from .boundary import Answer
from .calls import Trace, backward_block, forward_block
from .coroutines import Coroutine
from .stack import BlockRequest, BlockStack
from .too_large import watched

_BLOCKS_BEFORE_TRIMMING = 5  # after each one, a small sample would take a tenth longer, for the same memory


def stream_forward(
    stack: BlockStack,
    forwards: Sequence[Callable[[], Any]],
    finish: Callable[[int, Any], None],
    trained: frozenset[int] | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    on_turn: Callable[[int], None] = lambda index: None,
) -> list[Trace]:
    """Run each of `forwards` (one for each micro-batch), all of them through a block before the next block.

    finish(i, result): called as soon as the i-th forward has returned `result`, before the next one returns.
    trained:           the blocks that contain target layers; calls from the first of them on are kept. None: a plain
                       forward without gradients, in which nothing is kept.
    on_step:           told the number of block calls that are done, and the number of blocks; of a model that is run
                       as a whole, the number of micro-batches.
    on_turn:           told the number of the micro-batch whose turn it is, whenever that changes.

    Raises ModelError where micro-batches call different blocks, a block changes its inputs in place or leaves tensors
    behind (see `changes`), TooLargeError where memory does not suffice for one of them.
    """
    if not stack.names:
        _run_whole(forwards, finish, trained is not None, on_step, on_turn)
        return [Trace() for _ in forwards]
    passages = [_Passage(stack, forward, trained) for forward in forwards]
    try:
        with stack.intercepted():
            done = 0
            while _pass_a_block(stack, passages, finish, on_turn):
                done += 1
                _trim(stack, done)
                on_step(done, len(stack.names))
    finally:
        for passage in passages:
            passage.close()
    return [passage.trace for passage in passages]


def _run_whole(
    forwards: Sequence[Callable[[], Any]],
    finish: Callable[[int, Any], None],
    with_grad: bool,
    on_step: Callable[[int, int], None],
    on_turn: Callable[[int], None],
) -> None:
    """Each micro-batch goes through the whole model at once and is finished before the next one begins."""
    for index, forward in enumerate(forwards):
        on_turn(index)
        with watched(index, None), _changes_in_place_told():
            with torch.set_grad_enabled(with_grad):
                result = forward()
            finish(index, result)
            del result
        on_step(index + 1, len(forwards))


@contextmanager
def _changes_in_place_told() -> Iterator[None]:
    """Raises ModelError where autograd finds that a tensor it needs was changed."""
    try:
        yield
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise ModelError(
            f'the model changes in place what its backward needs; schedule="blocks" may do. {describe(error)[:200]}'
        ) from error


def _pass_a_block(
    stack: BlockStack,
    passages: Sequence[_Passage],
    finish: Callable[[int, Any], None],
    on_turn: Callable[[int], None],
) -> bool:
    """Every micro-batch goes on to the next block and through it, one after the other. False: all have finished."""
    block: int | None = None
    with ExitStack() as weights:
        for index, passage in enumerate(passages):
            on_turn(index)
            with watched(index, None):
                request = passage.proceed()
                if request is None:
                    result, passage.result = passage.result, None
                    finish(index, result)
                    del result
            arrived = None if request is None else request.block
            if index == 0:
                block = arrived
                if block is not None:
                    weights.enter_context(stack.loaded(block))
                    stack.store.prefetch(stack.names[(block + 1) % len(stack.names)])
            elif arrived != block:
                raise _different_ways(stack, block, arrived)
            if request is not None:
                with watched(index, block):
                    passage.compute(request)
    return block is not None


class _Passage:
    """One micro-batch on its way: its coroutine, what it waits with, and the trace it leaves."""

    def __init__(self, stack: BlockStack, forward: Callable[[], Any], trained: frozenset[int] | None) -> None:
        self.trace = Trace()
        self.result: Any = None
        self._stack = stack
        self._trained = trained
        self._coroutine = Coroutine(_with_modes(trained is not None, forward))
        self._answers: list[Answer] = []  # the one before, which rests, and the one to be given

    def proceed(self) -> BlockRequest | None:
        """Run the model on to its next block; None when it has returned, with its `result` here."""
        reply = None
        if self._answers:
            for answer in self._answers[:-1]:
                answer.wake()
            del self._answers[:-1]
            reply = self._answers[-1].give()
        request: BlockRequest | None = self._coroutine.resume(reply)
        if self._coroutine.finished:
            self.result, self._coroutine.result = self._coroutine.result, None
            self._answers.clear()
        return request

    def compute(self, request: BlockRequest) -> None:
        """Pass the block, and wait with what comes out of it."""
        outputs, gradients = forward_block(self._stack, request, self.trace, self._trained)
        self._answers.append(Answer(outputs, self._stack.keeper, gradients))
        del outputs, request
        for answer in self._answers[:-1]:
            answer.rest()

    def close(self) -> None:
        self._coroutine.close()


def _with_modes(grad: bool, forward: Callable[[], Any]) -> Callable[[], Any]:
    """`forward` as it is to run in a thread of its own, which inherits neither grad mode nor CUDA device and stream."""
    streams = [torch.cuda.current_stream()] if torch.cuda.is_initialized() else []

    def run() -> Any:
        with ExitStack() as modes:
            modes.enter_context(torch.set_grad_enabled(grad))
            for stream in streams:
                modes.enter_context(torch.cuda.stream(stream))
            return forward()

    return run


def _trim(stack: BlockStack, done: int) -> None:
    """This schedule is there to save memory, and on a CPU freed pieces would add up."""
    if stack.device.type == "cpu" and done % _BLOCKS_BEFORE_TRIMMING == 0:
        trim_heap()


def _different_ways(stack: BlockStack, *blocks: int | None) -> ModelError:
    called = ", ".join("none" if block is None else stack.names[block] for block in blocks)
    return ModelError(
        f"micro-batches take different ways through the model ({called}), so it cannot be streamed; use one"
        " micro-batch (a larger `batch_size`)"
    )


def stream_backward(
    stack: BlockStack,
    traces: Sequence[Trace],
    order: Sequence[int],
    on_turn: Callable[[int], None] = lambda index: None,
) -> Iterator[int]:
    """Back-propagate through all blocks in reverse, all micro-batches through a block at a time.

    order:   the blocks as called; a process without traces follows the others'.
    on_turn: as in the forward.
    Yields the index of a block when all its gradients have been collected (by hooks on its layers). Traces are
    emptied on the way. Raises TooLargeError where memory does not suffice for one of the micro-batches.
    """
    for step in reversed(range(len(order))):
        block = order[step]
        with stack.loaded(block) if traces else nullcontext():
            if step and traces:
                stack.store.prefetch(stack.names[order[step - 1]])
            for index, trace in enumerate(traces):
                on_turn(index)
                with watched(index, block):
                    backward_block(stack, trace.calls.pop())
        _trim(stack, step)
        if block not in order[:step]:  # a block that is used again earlier is not done yet
            yield block
