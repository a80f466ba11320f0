"""Which parameters are a pair (A, B): by exact module and adapter name, never by position."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..adapter.adapter import Adapter
from ..adapter.files import FACTORS
from ..errors import ConfigError
from ..linalg.factors import LoraPair
from .stacking import FactorPair

PairSource = Adapter | nn.Module | Mapping[str, LoraPair] | Iterable[FactorPair]


def find_pairs(source: PairSource) -> list[FactorPair]:
    """The pairs of an adapter, of a PEFT model, of a mapping by layer name, or as they are given.

    Raises ConfigError for a factor without its partner, and for a factor in several pairs.
    """
    if isinstance(source, nn.Module):
        pairs = peft_pairs(source)
    elif isinstance(source, Adapter | Mapping):
        factors = source.pairs if isinstance(source, Adapter) else source
        pairs = [FactorPair(name, pair.A, pair.B) for name, pair in factors.items()]
    else:
        pairs = list(source)
    _check_distinct(pairs)
    return pairs


def peft_pairs(model: nn.Module) -> list[FactorPair]:
    """lora_A.<adapter> and lora_B.<adapter> of each module of a PEFT model, where at least one of both is trained.

    PEFT's ParamWrapper holds the stacked factors of `num_experts` experts. Embeddings (lora_embedding_A) are no pairs.
    Raises ConfigError where there are none, or a trained factor has no partner.
    """
    pairs = []
    for name, module in model.named_modules():
        children = dict(module.named_children())
        A, B = (_weights(name, children.get(factor)) for factor in FACTORS)
        num_experts = vars(module).get("num_experts", 1) if "parameter_name" in vars(module) else 1
        for adapter in dict.fromkeys((*A, *B)):
            full_name = f"{name} ({adapter})"
            if not any(weights[adapter].requires_grad for weights in (A, B) if adapter in weights):
                continue
            if adapter not in A or adapter not in B:
                present, missing = FACTORS if adapter in A else reversed(FACTORS)
                raise ConfigError(f"{full_name} has {present} but no {missing}; freeze it, or use plain AdamW")
            pairs.append(FactorPair(full_name, A[adapter], B[adapter], num_experts))
    if not pairs:
        raise ConfigError(
            f"the model has no trainable {' and '.join(FACTORS)}; load the adapter with is_trainable=True"
        )
    return pairs


def check_held(pairs: Iterable[FactorPair], param_groups: Iterable[Mapping[str, object]]) -> None:
    """Raise ConfigError unless both factors of every pair are among the parameters, or one is and the other is frozen.

    Where the parameters have names, those named as LoRA factors must all be in a pair.
    """
    held: set[int] = set()
    named: dict[str, Tensor] = {}
    for group in param_groups:
        params = group["params"]
        assert isinstance(params, list)
        held.update(id(parameter) for parameter in params)
        names = group.get("param_names")
        if isinstance(names, list):
            named.update(zip(names, params, strict=True))
    paired: set[int] = set()
    for pair in pairs:
        _check_pair(pair, held)
        paired.update((id(pair.A), id(pair.B)))
    for name, parameter in named.items():
        if not set(FACTORS).isdisjoint(name.split(".")) and parameter.requires_grad and id(parameter) not in paired:
            raise ConfigError(f"parameter {name} is a LoRA factor in none of the pairs; pass its pair, or freeze it")


def _check_pair(pair: FactorPair, held: set[int]) -> None:
    absent = [(letter, factor) for letter, factor in (("A", pair.A), ("B", pair.B)) if id(factor) not in held]
    if len(absent) == 2:
        raise ConfigError(f"{pair.name}: neither A nor B is among the parameters; pass the very tensors of the pair")
    for letter, factor in absent:
        if factor.requires_grad:
            raise ConfigError(f"{pair.name}: {letter} is trained, but not among the parameters; pass it too")
    for letter, factor in (("A", pair.A), ("B", pair.B)):
        if factor.dtype == torch.float16:
            raise ConfigError(
                f"{pair.name}: {letter} is float16, which the preconditioned gradient overflows; "
                "train the adapter in float32 or bfloat16"
            )


def _check_distinct(pairs: Iterable[FactorPair]) -> None:
    owners: dict[int, str] = {}
    for pair in pairs:
        for factor in (pair.A, pair.B):
            if id(factor) in owners:
                raise ConfigError(f"{pair.name} and {owners[id(factor)]} share a factor; it can be in one pair only")
            owners[id(factor)] = pair.name


def _weights(name: str, container: nn.Module | None) -> dict[str, nn.Parameter]:
    """Weights by adapter name of PEFT's lora_A or lora_B, a ModuleDict of linear layers or convolutions."""
    if container is None or not list(container.parameters()):
        return {}
    layers = container.items() if isinstance(container, nn.ModuleDict) else [("", container)]
    weights = {adapter: getattr(layer, "weight", None) for adapter, layer in layers}
    found = {adapter: weight for adapter, weight in weights.items() if isinstance(weight, nn.Parameter)}
    if found.keys() != weights.keys():
        raise ConfigError(f"{name}: its LoRA factors are no layers with a weight (AdaLoRA?); use plain AdamW")
    return found
