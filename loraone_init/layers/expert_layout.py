"""How the factors of experts are stored: stacked, as PEFT's `target_parameters` reads them (PEFT 0.19.1 or newer)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..linalg.factors import LoraPair


@dataclass(frozen=True)
class ExpertStack:
    """The experts of one fused parameter, such as `model.layers.0.mlp.experts.gate_up_proj`.

    num_experts: E; their factors are A (r, in) and B (out, r) of `expert_name(parameter, e)`.
    path:        what their stacked tensors are called by, `<path>.lora_A.weight` (E·r, in), expert first, and
                 `<path>.lora_B.weight` (out, r·E), expert last.
    """

    num_experts: int
    path: str


def expert_name(parameter: str, expert: int) -> str:
    return f"{parameter}.{expert}"


def expert_names(experts: Mapping[str, ExpertStack]) -> list[str]:
    return [expert_name(parameter, e) for parameter, stack in experts.items() for e in range(stack.num_experts)]


def wrapper_paths(parameters: Sequence[str]) -> dict[str, str]:
    """Where PEFT puts the factors of some parameters of one module, given in the module's order.

    PEFT wraps the module for the first, the result for the second, and so on: the last is the outermost.
    """
    last = len(parameters) - 1
    return {name: name.rpartition(".")[0] + ".base_layer" * (last - i) for i, name in enumerate(parameters)}


_RENAMED = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def renamed_by_peft(module: str) -> bool:
    """Whether PEFT, in a model with fused experts, takes a module of this name in `target_modules` for a part of them.

    So it does with adapters of transformers 4, where experts were such modules; dense layers and shared experts are
    lost by that (PEFT 0.21.2). Named as `target_parameters`, `<module>.weight`, they are adapted, under the same names.
    """
    return module.rpartition(".")[2] in _RENAMED


def stack_experts(pairs: Mapping[str, LoraPair], experts: Mapping[str, ExpertStack]) -> dict[str, LoraPair]:
    """Factors by the path of their tensors: those of experts stacked, all others as they are."""
    inside = set(expert_names(experts))
    stacked = {name: pair for name, pair in pairs.items() if name not in inside}
    for parameter, stack in experts.items():
        of_experts = [pairs[expert_name(parameter, e)] for e in range(stack.num_experts)]
        A = torch.cat([pair.A for pair in of_experts])
        B = torch.stack([pair.B for pair in of_experts], dim=-1).flatten(1)
        stacked[stack.path] = LoraPair(A, B)
    return stacked


def split_experts(stacked: Mapping[str, LoraPair], experts: Mapping[str, ExpertStack]) -> dict[str, LoraPair]:
    """The inverse of `stack_experts`.

    Raises KeyError where a stack is missing, RuntimeError where its shape does not divide by E.
    """
    pairs = {path: pair for path, pair in stacked.items() if path not in {stack.path for stack in experts.values()}}
    for parameter, stack in experts.items():
        pair, E = stacked[stack.path], stack.num_experts
        As, Bs = pair.A.unflatten(0, (E, -1)), pair.B.unflatten(1, (-1, E)).unbind(-1)
        for e in range(E):
            pairs[expert_name(parameter, e)] = LoraPair(As[e].clone(), Bs[e].contiguous())
    return pairs
