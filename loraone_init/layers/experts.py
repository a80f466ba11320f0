"""Fused experts: every expert's matrix as a linear layer of its own, which hooks can see.

transformers keeps the weights of all experts of a layer in one parameter (E, out, in), or (E, in, out), and multiplies
with it directly. While gradients are collected, the experts' forward is replaced by one that calls a layer for each
expert; it computes what transformers' own `grouped_mm` implementation does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from ..errors import ModelError
from ..transformers_private import EXPERTS_INTERFACE, apply_gate
from .expert_layout import ExpertStack, renamed_by_peft, wrapper_paths
from .patching import replaced_forward


class ExpertLinear(nn.Module):
    """One expert's matrix W (out, in) and bias, read from the fused parameter at each use; it has no tensors itself."""

    owner: Any  # the module with the fused parameter

    def __init__(self, owner: nn.Module, parameter: str, index: int) -> None:
        super().__init__()
        self.__dict__["owner"] = owner  # a plain attribute: as a child it would be part of the model twice
        self.parameter = parameter
        self.index = index

    @property
    def weight(self) -> torch.Tensor:
        matrix: torch.Tensor = getattr(self.owner, self.parameter)[self.index]
        return matrix.T if self.owner.is_transposed else matrix

    @property
    def bias(self) -> torch.Tensor | None:
        return getattr(self.owner, f"{self.parameter}_bias")[self.index] if self.owner.has_bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


def is_fused_experts(module: nn.Module) -> bool:
    """Whether the module's experts can be run one by one."""
    return all(hasattr(module, name) for name in EXPERTS_INTERFACE) and all(
        isinstance(parameter := module._parameters.get(name), nn.Parameter) and parameter.ndim == 3
        for name in fused_parameters(module)
    )


def is_other_experts(module: nn.Module) -> bool:
    """Whether it looks like fused experts of a form that is not known here (Llama 4, DBRX)."""
    return (
        "Expert" in type(module).__name__
        and any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))
        and not isinstance(module, nn.Linear)
        and not is_fused_experts(module)
    )


def fused_parameters(experts: nn.Module) -> tuple[str, str]:
    """Names of the parameters that are multiplied with, first the one that comes first."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def expert_layers(experts: nn.Module, parameter: str) -> list[ExpertLinear]:
    """The matrices of all experts of a fused parameter, as layers."""
    return [ExpertLinear(experts, parameter, index) for index in range(len(getattr(experts, parameter)))]


def expert_stacks(targets: Mapping[str, nn.Module]) -> dict[str, ExpertStack]:
    """The fused parameters among the targets, and where PEFT puts their stacked factors."""
    parameters: dict[nn.Module, dict[str, str]] = {}
    for name, target in targets.items():
        if isinstance(target, ExpertLinear):
            full_name, _, _ = name.rpartition(".")
            parameters.setdefault(target.owner, {})[target.parameter] = full_name
    stacks = {}
    for owner, names in parameters.items():
        ordered = [names[parameter] for parameter in owner._parameters if parameter in names]
        for name, path in wrapper_paths(ordered).items():
            stacks[name] = ExpertStack(len(getattr(owner, name.rpartition(".")[2])), path)
    return stacks


def renamed_targets(model: nn.Module, targets: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Targets that PEFT has to be told of by their weight's name. Raises ModelError where that is packed."""
    if not any(map(is_fused_experts, model.modules())):
        return ()
    layers = {name: target for name, target in targets.items() if not isinstance(target, ExpertLinear)}
    renamed = tuple(name for name in layers if renamed_by_peft(name))
    for name in renamed:
        if type(layers[name].weight) is not nn.Parameter:
            raise ModelError(
                f"PEFT takes layer {name} for a part of the fused experts, and cannot adapt it by its weight, which is"
                " quantized; leave such layers out with `exclude_modules`"
            )
    return renamed


@contextmanager
def experts_as_layers(model: nn.Module, targets: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, fused experts of which some are targets call those, and hooks on them see inputs and outputs."""
    layers: dict[nn.Module, dict[str, list[ExpertLinear]]] = {}
    for target in targets.values():
        if isinstance(target, ExpertLinear):
            layers.setdefault(target.owner, {}).setdefault(target.parameter, []).append(target)
    for module in model.modules():
        if is_fused_experts(module) and module.down_proj.dtype == torch.float64:
            layers.setdefault(module, {})  # which grouped_mm refuses
    with ExitStack() as stack:
        for owner, chosen in layers.items():
            up, down = (chosen.get(name) or expert_layers(owner, name) for name in fused_parameters(owner))
            stack.enter_context(replaced_forward(owner, partial(_run_experts, owner, up, down)))
        yield


def _run_experts(
    owner: Any,
    up: Sequence[ExpertLinear],
    down: Sequence[ExpertLinear],
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """hidden_states (tokens, hidden), top_k_index and top_k_weights (tokens, k) -> (tokens, hidden).

    Tokens are sorted by expert once; a gather and a scatter for each expert would each touch all of them.
    """
    tokens, k = top_k_index.shape
    chosen, order = torch.sort(top_k_index.reshape(-1), stable=True)
    sizes = torch.bincount(chosen, minlength=len(up)).tolist()
    outputs = []
    for expert, x in enumerate(hidden_states[order // k].split(sizes)):
        if len(x):
            h = up[expert](x)
            h = apply_gate(owner, h) if owner.has_gate else owner.act_fn(h)
            outputs.append(down[expert](h))
    y = torch.cat(outputs)
    if getattr(owner, "has_post_expert_norm", False):  # since transformers 5.18
        y = owner.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1, 1)[order]
    summed = y[torch.argsort(order)].view(tokens, k, -1).sum(dim=1)
    return summed.to(hidden_states.dtype)
