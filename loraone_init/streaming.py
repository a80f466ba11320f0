"""Run a model block by block: every micro-batch passes a block while its weights are there, then the next block.

The model's own forward runs once for each micro-batch, so that masks, positions and all glue between the blocks are
the model's. A block's call is intercepted: the driver computes it from detached inputs, which it keeps, and answers
with detached outputs. What remains between the blocks is a small autograd graph of glue for each micro-batch, whose
leaves are the blocks' outputs. Backward goes through the blocks in reverse: compute again from the kept inputs (unless
memory allowed to keep the forward's graph), back-propagate the outputs' `.grad`, hand the inputs' gradients to the
glue, where they add up in the `.grad` of the earlier outputs. Tensors that several blocks share (an encoder's output,
a position bias) need nothing special; what they share through a mapping does (see `mappings`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .activations import ActivationBudget, HeldBytes
from .coroutines import Coroutine, pause
from .errors import ModelError
from .mappings import Written, as_dicts, run_with_mappings, write_back
from .patching import replaced_forward
from .stores import WeightStore


@dataclass(frozen=True)
class BlockRequest:
    """A micro-batch has arrived at a block."""

    block: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class BlockCall:
    """One micro-batch's passage through one block, as kept for the backward.

    args, kwargs: inputs, every floating tensor a detached leaf.
    sources:      (tensor in the glue graph, its leaf) where a gradient has to go further back.
    outputs:      the floating output tensors, as leaves; the glue fills their `.grad`.
    graph:        what the block returned, with its autograd graph, if that is kept; None: it is computed again.
    """

    block: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sources: list[tuple[torch.Tensor, torch.Tensor]]
    outputs: list[torch.Tensor]
    graph: Any = None


@dataclass
class Trace:
    """The blocks that one micro-batch went through, in order."""

    calls: list[BlockCall] = field(default_factory=list)


class BlockStack:
    """A model's blocks, their own forwards, and the store that holds their weights."""

    def __init__(self, model: nn.Module, names: Sequence[str], store: WeightStore) -> None:
        self.model = model
        self.names = list(names)
        self.store = store
        self._modules = [model.get_submodule(name) for name in names]
        self._forwards: list[Callable[..., Any]] = [module.forward for module in self._modules]

    @contextmanager
    def intercepted(self) -> Iterator[None]:
        """Inside, a call of a block pauses the running coroutine with a `BlockRequest`."""
        with ExitStack() as stack:
            for index, module in enumerate(self._modules):
                stack.enter_context(replaced_forward(module, partial(_request_block, index)))
            yield

    def module(self, block: int) -> nn.Module:
        return self._modules[block]

    def run(self, block: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Written]:
        """The block's own forward: what it returns, and what it writes into mappings that it is given."""
        return run_with_mappings(self._forwards[block], args, kwargs)


def _request_block(block: int, *args: Any, **kwargs: Any) -> Any:
    outputs, written = pause(BlockRequest(block, args, as_dicts(kwargs)))
    write_back(kwargs, written)
    return outputs


def stream_forward(
    stack: BlockStack,
    forwards: Sequence[Callable[[], Any]],
    finish: Callable[[int, Any], None],
    trained: frozenset[int] | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    budget: ActivationBudget | None = None,
) -> list[Trace]:
    """Run each of `forwards` (one for each micro-batch), all of them through a block before the next block.

    finish(i, result): called as soon as the i-th forward has returned `result`, before the next one returns.
    trained:           the blocks that contain target layers; calls from the first of them on are kept. None: a plain
                       forward without gradients, in which nothing is kept.
    on_step:           told the number of block calls that are done, and the number of blocks.
    budget:            for graphs that are kept for the backward; None keeps none.

    Raises ModelError where micro-batches call different blocks, or a block changes its inputs in place.
    """
    traces = [Trace() for _ in forwards]
    coroutines = [Coroutine(partial(_with_grad, trained is not None, forward)) for forward in forwards]
    try:
        with stack.intercepted():
            replies: list[Any] = [None] * len(coroutines)
            done = 0
            while (requests := _advance(coroutines, replies, finish)) is not None:
                block = _common_block(stack, requests)
                if not done and budget is not None:
                    budget.reserve(len(stack.names) * sum(map(_input_bytes, requests)))
                with stack.store.loaded(stack.names[block]):
                    for index, request in enumerate(requests):
                        replies[index] = _forward_block(stack, request, traces[index], trained, budget)
                        requests[index] = None  # its inputs are kept in the trace, if at all
                done += 1
                on_step(done, len(stack.names))
    finally:
        for coroutine in coroutines:
            coroutine.close()
    return traces


def _with_grad(enabled: bool, forward: Callable[[], Any]) -> Any:
    with torch.set_grad_enabled(enabled):  # grad mode belongs to the thread
        return forward()


def _advance(
    coroutines: list[Coroutine], replies: list[Any], finish: Callable[[int, Any], None]
) -> list[BlockRequest | None] | None:
    """Resume every coroutine; their requests, or None when all have finished."""
    requests: list[BlockRequest | None] = []
    for index, coroutine in enumerate(coroutines):
        reply, replies[index] = replies[index], None
        request = coroutine.resume(reply)
        del reply
        requests.append(request)
        if coroutine.finished:
            result, coroutine.result = coroutine.result, None
            finish(index, result)
            del result
    if all(request is None for request in requests):
        return None
    return requests


def _common_block(stack: BlockStack, requests: Sequence[BlockRequest | None]) -> int:
    blocks = {request.block if request is not None else None for request in requests}
    block = blocks.pop()
    if blocks or block is None:
        called = ", ".join("none" if b is None else stack.names[b] for b in {block, *blocks})
        raise ModelError(
            f"micro-batches take different ways through the model ({called}), so it cannot be streamed; use one"
            " micro-batch (a larger --batch-size)"
        )
    return block


def _forward_block(
    stack: BlockStack,
    request: BlockRequest | None,
    trace: Trace,
    trained: frozenset[int] | None,
    budget: ActivationBudget | None,
) -> Any:
    """Compute a block; keep the call if its backward is needed, with its graph if that fits; the outputs, detached."""
    assert request is not None
    inputs, spec = pytree.tree_flatten((request.args, request.kwargs))
    needs_grad = trained is not None and (request.block in trained or any(map(_requires_grad, inputs)))
    leaves = [_leaf(value, _requires_grad(value)) for value in inputs]
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    versions = [_version(tensor) for tensor in inputs]
    graph = None
    if needs_grad and budget is not None and budget.allows(_input_bytes(request)):
        outputs, graph = _with_graph(stack, request.block, args, kwargs, budget, _input_bytes(request))
    else:
        with torch.no_grad():
            outputs = stack.run(request.block, args, kwargs)
    if versions != [_version(tensor) for tensor in inputs]:
        raise _changes_inputs(stack.names[request.block])
    flat, out_spec = pytree.tree_flatten(outputs)
    flat = [_leaf(value, needs_grad) for value in flat]
    if needs_grad:
        sources = [(value, leaf) for value, leaf in zip(inputs, leaves, strict=True) if _requires_grad(value)]
        outs = [value for value in flat if _requires_grad(value)]
        trace.calls.append(BlockCall(request.block, args, kwargs, sources, outs, graph))
    return pytree.tree_unflatten(flat, out_spec)


def _with_graph(
    stack: BlockStack, block: int, args: tuple[Any, ...], kwargs: dict[str, Any], budget: ActivationBudget, size: int
) -> tuple[Any, Any]:
    """What the block returns, twice: plain, and with its graph, or None if that turns out not to fit.

    size: of the block's input, in bytes.
    """
    held = HeldBytes()
    try:
        with torch.enable_grad(), held.counted(stack.module(block)):
            outputs = stack.run(block, args, kwargs)
    except RuntimeError as error:
        if "in-place operation" in str(error):
            raise _changes_inputs(stack.names[block]) from error
        raise
    plain = pytree.tree_map(partial(_leaf, requires_grad=False), outputs)
    return plain, outputs if budget.take(held.total, size) else None


def _changes_inputs(block: str) -> ModelError:
    return ModelError(f"block {block} changes its inputs in place; it cannot be computed again")


def stream_backward(stack: BlockStack, traces: Sequence[Trace], order: Sequence[int] | None = None) -> Iterator[int]:
    """Back-propagate through all blocks in reverse, all micro-batches through a block at a time.

    order: the blocks as called, which traces tell; a process without any follows the others'.
    Yields the index of a block when all its gradients have been collected (by hooks on its layers). Traces are
    emptied on the way.
    """
    if order is None:
        order = [call.block for call in traces[0].calls] if traces else []
    for step in reversed(range(len(order))):
        block = order[step]
        with stack.store.loaded(stack.names[block]) if traces else nullcontext():
            for trace in traces:
                _backward_block(stack, trace.calls.pop())
        if block not in order[:step]:  # a block that is used again earlier is not done yet
            yield block


def _backward_block(stack: BlockStack, call: BlockCall) -> None:
    outputs = call.graph
    if outputs is None:
        with torch.enable_grad():
            outputs = stack.run(call.block, call.args, call.kwargs)
    tensors = [value for value in pytree.tree_leaves(outputs) if _is_floating(value)]
    pairs = [
        (tensor, leaf.grad)
        for tensor, leaf in zip(tensors, call.outputs, strict=True)
        if tensor.requires_grad and leaf.grad is not None
    ]
    if pairs:
        torch.autograd.backward([tensor for tensor, _ in pairs], [grad for _, grad in pairs])
    for source, leaf in call.sources:
        if leaf.grad is not None:
            # Retained: blocks that share a source pass through the same glue, one after the other.
            torch.autograd.backward(source, leaf.grad, retain_graph=True)


def _input_bytes(request: BlockRequest | None) -> int:
    """Of the floating tensors that a call takes, each storage once."""
    tensors = (
        [value for value in pytree.tree_leaves((request.args, request.kwargs)) if _is_floating(value)]
        if request
        else []
    )
    return sum({tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in tensors}.values())


def _leaf(value: Any, requires_grad: bool) -> Any:
    """A tensor cut off from its graph (same storage); anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().requires_grad_(requires_grad and value.is_floating_point())


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _requires_grad(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _version(value: Any) -> int | None:
    return value._version if isinstance(value, torch.Tensor) else None
