"""One micro-batch through one block: the forward and what is kept of it, and the backward, which computes it again."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree

from ..errors import ModelError
from .boundary import Gradients, is_floating, leaf, requires_grad
from .changes import Objects, changed_after, check_no_gradient_passes
from .keeping import Kept
from .stack import BlockRequest, BlockStack, run_request


@dataclass
class BlockCall:
    """One micro-batch's passage through one block, as kept for the backward.

    inputs:    all arguments, flattened; tensors as kept.
    spec:      how to put them together again.
    edges:     (index of an input, place in the glue graph) where a gradient has to go further back.
    gradients: of the floating outputs, as the glue hands them in.
    objects:   what is in those of the inputs that are neither tensors nor known containers.
    request:   as the model called, without its arguments.
    """

    inputs: list[Any]
    spec: pytree.TreeSpec
    edges: list[tuple[int, GradientEdge]]
    gradients: Gradients
    objects: Objects
    request: BlockRequest


@dataclass
class Trace:
    """The blocks that one micro-batch went through, in order."""

    calls: list[BlockCall] = field(default_factory=list)


def forward_block(
    stack: BlockStack, request: BlockRequest, trace: Trace, trained: frozenset[int] | None
) -> tuple[Any, Gradients | None]:
    """Compute a block; keep the call if its backward is needed; the outputs, detached, and where their gradients go."""
    name = stack.names[request.block]
    inputs, spec = pytree.tree_flatten((request.args, request.kwargs))
    wanted = trained is not None and request.modes.grad
    needs_grad = wanted and (request.block in (trained or ()) or any(map(requires_grad, inputs)))
    args, kwargs = pytree.tree_unflatten([leaf(value, requires_grad(value)) for value in inputs], spec)
    versions = [_version(tensor) for tensor in inputs]
    with torch.no_grad():
        outputs = run_request(stack, request, args, kwargs)
    if versions != [_version(tensor) for tensor in inputs]:
        raise ModelError(f"block {name} changes its inputs in place; it cannot be computed again")
    outputs = pytree.tree_map(partial(leaf, with_grad=False), outputs)
    if not needs_grad:
        return outputs, None
    objects = Objects(inputs)
    check_no_gradient_passes(name, objects, Objects(pytree.tree_leaves(outputs)))
    keep = stack.keeper.put
    kept = [keep(value) if isinstance(value, torch.Tensor) else value for value in inputs]
    edges = [(index, get_gradient_edge(value)) for index, value in enumerate(inputs) if requires_grad(value)]
    gradients = Gradients(stack.keeper, sum(map(is_floating, pytree.tree_leaves(outputs))))
    bare = replace(request, args=(), kwargs={})
    trace.calls.append(BlockCall(kept, spec, edges, gradients, objects, bare))
    return outputs, gradients


def backward_block(stack: BlockStack, call: BlockCall) -> None:
    _check_unchanged(stack, call)
    leaves, outputs = _compute_again(stack, call)
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
    if path := call.objects.change():
        raise changed_after(path, stack.names[call.request.block])
    if any(value.is_changed for value in call.inputs if isinstance(value, Kept)):
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


def _version(value: Any) -> int | None:
    return value._version if isinstance(value, torch.Tensor) else None
