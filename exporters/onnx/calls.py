"""What every block of a model is called with, and what it gives: recorded, and replayed from its tensors alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from transformers import DynamicCache


_CANNOT_REPLAY = (RuntimeError, LookupError, AttributeError, TypeError, ValueError)
"""What a block raises that needs more than the tensors of its call, such as another layer's keys."""


@dataclass(frozen=True)
class BlockCall:
    """One call of a block.

    leaves, spec:         of (args, kwargs).
    result, result_spec:  of what the block returned.
    slots:                layers of the cache that it writes.
    inputs:  the tensors among `leaves`, then keys and values of each slot before the call (batch, heads, past, dim).
    outputs: the tensors among `result`, then keys and values of each slot after it.
    """

    leaves: list[Any]
    spec: pytree.TreeSpec
    result: list[Any]
    result_spec: pytree.TreeSpec
    slots: tuple[int, ...]
    inputs: list[Tensor]
    outputs: list[Tensor]

    def arguments(self, inputs: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any], DynamicCache]:
        """args, kwargs and the cache in them, with other tensors."""
        num_past = 2 * len(self.slots)
        tensors, past = inputs[: len(inputs) - num_past], inputs[len(inputs) - num_past :]
        cache = filled_cache({slot: (past[2 * i], past[2 * i + 1]) for i, slot in enumerate(self.slots)})
        leaves = [cache if _is_cache(leaf) else leaf for leaf in _with_tensors(self.leaves, tensors)]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs, cache

    def stand_in(self, args: Any, kwargs: Any, outputs: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        """Take a call in the block's place: its inputs, and what to return for `outputs`; the cache is updated."""
        leaves = pytree.tree_leaves((args, kwargs), is_leaf=_is_cache)
        inputs = _tensors(leaves)
        num_tensors = len(outputs) - 2 * len(self.slots)
        for cache in filter(_is_cache, leaves):
            for number, slot in enumerate(self.slots):
                inputs.extend(layer_states(cache, slot))
                layer, start = cache.layers[slot], num_tensors + 2 * number
                layer.keys, layer.values = outputs[start], outputs[start + 1]
        return inputs, pytree.tree_unflatten(_with_tensors(self.result, outputs[:num_tensors]), self.result_spec)

    def replay(self, block: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The block's outputs for other tensors."""
        args, kwargs, cache = self.arguments(inputs)
        result = _tensors(pytree.tree_leaves(block(*args, **kwargs)))
        return result + [state for slot in self.slots for state in layer_states(cache, slot)]

    def fits(self, block: nn.Module, other: nn.Module, call: BlockCall) -> bool:
        """Whether `block`, with the weights of `other`, computes what `other` did in `call`, bit for bit."""
        if not self._is_like(call):
            return False
        weights = dict(other.named_parameters()) | dict(other.named_buffers())
        try:
            with with_weights(block, weights):
                found = self.replay(block, call.inputs)
        except _CANNOT_REPLAY:
            return False
        return len(found) == len(call.outputs) and all(map(torch.equal, found, call.outputs))

    def _is_like(self, call: BlockCall) -> bool:
        if (self.spec, self.result_spec, len(self.slots)) != (call.spec, call.result_spec, len(call.slots)):
            return False
        ours, theirs = ([leaf for leaf in c.leaves if not isinstance(leaf, Tensor)] for c in (self, call))
        return all(a is b or a == b for a, b in zip(ours, theirs, strict=True) if not _is_cache(a))


@contextmanager
def with_weights(block: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """`block` with other parameters and buffers of the same names. Raises KeyError or RuntimeError on a misfit."""
    from torch.nn.utils.stateless import _reparametrize_module

    own = dict(block.named_parameters()) | dict(block.named_buffers())
    if {name: (t.shape, t.dtype) for name, t in own.items()} != {n: (t.shape, t.dtype) for n, t in weights.items()}:
        raise KeyError("other weights")
    with _reparametrize_module(block, dict(weights)):
        yield


def record_calls(model: nn.Module, names: Sequence[str], run: Callable[[], object]) -> list[BlockCall]:
    """The call of every block during `run()`; [] where one is not called exactly once."""
    calls: dict[str, list[BlockCall]] = {name: [] for name in names}

    def recorder(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            leaves, spec = pytree.tree_flatten((args, kwargs), is_leaf=_is_cache)
            caches = [leaf for leaf in leaves if _is_cache(leaf)]
            before = _states(caches)
            inputs = [tensor.clone() for tensor in _tensors(leaves)]  # a block may work in place
            returned = forward(*args, **kwargs)
            result, result_spec = pytree.tree_flatten(returned)
            after = _states(caches)
            slots = tuple(slot for slot in after if before[slot][0] is not after[slot][0])
            call = BlockCall(
                leaves,
                spec,
                result,
                result_spec,
                slots,
                inputs + [state for slot in slots for state in before[slot]],
                _tensors(result) + [state for slot in slots for state in after[slot]],
            )
            calls[name].append(call)
            return returned

        return recorded

    with replaced_forwards(model, {name: recorder(name, model.get_submodule(name).forward) for name in names}):
        run()
    once = all(len(found) == 1 for found in calls.values())
    return [calls[name][0] for name in names] if once else []


@contextmanager
def replaced_forwards(model: nn.Module, forwards: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Call these in place of the modules' own forward."""
    with ExitStack() as stack:
        for name, forward in forwards.items():
            module = model.get_submodule(name)
            module.forward = forward
            stack.callback(delattr, module, "forward")
        yield


def filled_cache(states: Mapping[int, tuple[Tensor, Tensor]]) -> DynamicCache:
    """A cache that keeps all positions, sliding windows or not, with keys and values in some of its layers."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache()
    for slot in range(max(states, default=-1) + 1):
        layer = DynamicLayer()
        if slot in states:
            layer.lazy_initialization(*states[slot])
            layer.keys, layer.values = states[slot]
        cache.layers.append(layer)
    return cache


def layer_states(cache: DynamicCache, slot: int) -> tuple[Tensor, Tensor]:
    layer = cache.layers[slot]
    return layer.keys, layer.values


def _states(caches: Sequence[DynamicCache]) -> dict[int, tuple[Tensor, Tensor]]:
    return {slot: layer_states(cache, slot) for cache in caches for slot in range(len(cache.layers))}


def _is_cache(leaf: object) -> bool:
    from transformers import DynamicCache

    return isinstance(leaf, DynamicCache)


def _tensors(leaves: Sequence[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _with_tensors(leaves: Sequence[Any], tensors: Sequence[Tensor]) -> list[Any]:
    """`leaves` with their tensors replaced, in order."""
    replacements = iter(tensors)
    return [next(replacements) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
