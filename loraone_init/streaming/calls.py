"""One micro-batch through one block: the forward and what is kept of it, and the backward."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree

from ..errors import ModelError
from .activations import ActivationBudget, HeldBytes
from .boundary import Gradients, is_floating, leaf, requires_grad
from .changes import Objects, changed_after, check_no_gradient_passes
from .keeping import Kept
from .stack import BlockRequest, BlockStack, run_request


@dataclass
class BlockCall:
    """One micro-batch's passage through one block, as kept for the backward.

    inputs:    all arguments, flattened; tensors as kept, if the graph is not.
    spec:      how to put them together again.
    edges:     (index of an input, place in the glue graph) where a gradient has to go further back.
    gradients: of the floating outputs, as the glue hands them in.
    graph:     (leaf inputs, what the block returned with its graph), if that is kept; else it is computed again.
    versions:  of the inputs, by which changes in place are noticed.
    objects:   what is in those of the inputs that are neither tensors nor known containers.
    request:   as the model called, without its arguments.
    """

    inputs: list[Any]
    spec: pytree.TreeSpec
    edges: list[tuple[int, GradientEdge]]
    gradients: Gradients
    versions: list[int | None]
    objects: Objects
    request: BlockRequest
    graph: tuple[list[Any], Any] | None = None


@dataclass
class Trace:
    """The blocks that one micro-batch went through, in order."""

    calls: list[BlockCall] = field(default_factory=list)


def forward_block(
    stack: BlockStack,
    request: BlockRequest,
    trace: Trace,
    trained: frozenset[int] | None,
    budget: ActivationBudget | None,
) -> tuple[Any, Gradients | None]:
    """Compute a block; keep the call if its backward is needed, with its graph if that fits; the outputs, detached,
    and where their gradients go.
    """
    inputs, spec = pytree.tree_flatten((request.args, request.kwargs))
    wanted = trained is not None and request.modes.grad
    needs_grad = wanted and (request.block in (trained or ()) or any(map(requires_grad, inputs)))
    leaves = [leaf(value, requires_grad(value)) for value in inputs]
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    versions = [_version(tensor) for tensor in inputs]
    graph = None
    if needs_grad and budget is not None and budget.allows(input_bytes(request)):
        outputs, graph = _with_graph(stack, request, args, kwargs, budget)
    else:
        with torch.no_grad():
            outputs = run_request(stack, request, args, kwargs)
    if versions != [_version(tensor) for tensor in inputs]:
        raise _changes_inputs(stack.names[request.block])
    outputs = pytree.tree_map(partial(leaf, with_grad=False), outputs)
    if not needs_grad:
        return outputs, None
    objects = Objects(inputs)
    check_no_gradient_passes(stack.names[request.block], objects, Objects(pytree.tree_leaves(outputs)))
    keep = stack.keeper.put
    kept = [keep(value) if isinstance(value, torch.Tensor) else value for value in inputs] if graph is None else []
    edges = [(index, get_gradient_edge(value)) for index, value in enumerate(inputs) if requires_grad(value)]
    gradients = Gradients(stack.keeper, sum(map(is_floating, pytree.tree_leaves(outputs))))
    held = None if graph is None else (leaves, graph)
    bare = replace(request, args=(), kwargs={})
    call = BlockCall(kept, spec, edges, gradients, versions, objects, bare, held)
    trace.calls.append(call)
    return outputs, gradients


def _with_graph(
    stack: BlockStack, request: BlockRequest, args: tuple[Any, ...], kwargs: dict[str, Any], budget: ActivationBudget
) -> tuple[Any, Any]:
    """What the block returns, twice: plain, and with its graph, or None if that turns out not to fit."""
    block, held = request.block, HeldBytes()
    try:
        with torch.enable_grad(), held.counted(stack.module(block), stack.names[block]):
            outputs = run_request(stack, request, args, kwargs)
    except RuntimeError as error:
        if "in-place operation" in str(error):
            raise _changes_inputs(stack.names[block]) from error
        raise
    plain = pytree.tree_map(partial(leaf, with_grad=False), outputs)
    return plain, outputs if budget.take(held.total, input_bytes(request)) else None


def _changes_inputs(block: str) -> ModelError:
    return ModelError(f"block {block} changes its inputs in place; it cannot be computed again")


def backward_block(stack: BlockStack, call: BlockCall) -> None:
    _check_unchanged(stack, call)
    leaves, outputs = call.graph or _compute_again(stack, call)
    call.graph = None
    tensors = [value for value in pytree.tree_leaves(outputs) if is_floating(value)]
    pairs = [(tensor, call.gradients.take(index)) for index, tensor in enumerate(tensors) if tensor.requires_grad]
    pairs = [(tensor, gradient) for tensor, gradient in pairs if gradient is not None]
    if pairs:
        torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])
    for index, edge in call.edges:
        if leaves[index].grad is not None:
            # Retained: blocks that share a source pass through the same glue, one after the other.
            torch.autograd.backward(edge, leaves[index].grad, retain_graph=True)


def _check_unchanged(stack: BlockStack, call: BlockCall) -> None:
    """The glue may have gone on to work in place on what the block was given."""
    if call.graph is None:
        changed = any(value.is_changed for value in call.inputs if isinstance(value, Kept))
    else:
        changed = call.versions != [_version(tensor) for tensor in call.graph[0]]
    if path := call.objects.change():
        raise changed_after(path, stack.names[call.request.block])
    if changed:
        raise changed_after("an input", stack.names[call.request.block])


def _compute_again(stack: BlockStack, call: BlockCall) -> tuple[list[Any], Any]:
    """The inputs as leaves, which are kept no longer than they are needed, and the outputs with their graph."""
    inputs, call.inputs = call.inputs, []
    with_grad = {index for index, _ in call.edges}
    leaves = [
        leaf(value.get(), index in with_grad) if isinstance(value, Kept) else value
        for index, value in enumerate(inputs)
    ]
    del inputs
    args, kwargs = pytree.tree_unflatten(leaves, call.spec)
    with torch.enable_grad():
        return leaves, run_request(stack, call.request, args, kwargs)


def input_bytes(request: BlockRequest) -> int:
    """Of the floating tensors that a call takes, each storage once."""
    tensors = [value for value in pytree.tree_leaves((request.args, request.kwargs)) if is_floating(value)]
    return sum({tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in tensors}.values())


def _version(value: Any) -> int | None:
    return value._version if isinstance(value, torch.Tensor) else None
