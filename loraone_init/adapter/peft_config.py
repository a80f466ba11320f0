"""PEFT's configuration of an adapter: the content of adapter_config.json."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ..config import InitConfig
from ..layers.expert_layout import ExpertStack, expert_name, expert_names
from ..layers.patterns import find_value, patterns


def peft_config(
    config: InitConfig,
    ranks: Mapping[str, int],
    *,
    base: Mapping[str, str | None],
    task_type: str | None,
    fan_in_fan_out: bool,
    saved: Iterable[str],
    experts: Mapping[str, ExpertStack],
    by_parameter: Collection[str],
) -> dict[str, Any]:
    """The configuration of an adapter with these ranks by layer; for the other arguments see `Adapter`.

    None of our own fields are in it: PEFT warns about those. `init_lora_weights: true` has no effect on loading, unlike
    "pissa" or "lora_ga", which would edit the base.
    """
    parameters = [*experts, *(f"{name}.weight" for name in by_parameter)]
    modules = ranks.keys() - {*expert_names(experts), *by_parameter}
    saved = sorted(saved)
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base.get("name"),
        "revision": base.get("revision"),
        "r": config.rank,
        "lora_alpha": int(config.alpha) if float(config.alpha).is_integer() else config.alpha,
        "use_rslora": config.scaling == "rslora",
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": sorted(modules),
        **({"target_parameters": sorted(parameters)} if parameters else {}),
        **({"modules_to_save": saved} if saved else {}),
        **_patterns(config, _ranks_by_name(ranks, experts, by_parameter)),
    }


def _ranks_by_name(
    ranks: Mapping[str, int], experts: Mapping[str, ExpertStack], by_parameter: Collection[str]
) -> dict[str, int]:
    """Ranks by the names that PEFT's patterns are matched with: the experts of one parameter share theirs."""
    inside = {*expert_names(experts)}
    outside = {name: rank for name, rank in ranks.items() if name not in inside}
    named = {f"{name}.weight" if name in by_parameter else name: rank for name, rank in outside.items()}
    return named | {parameter: ranks[expert_name(parameter, 0)] for parameter in experts}


def _patterns(config: InitConfig, ranks: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """PEFT's `rank_pattern` and `alpha_pattern`, where there are several ranks: α so that s is the same in all."""
    if all(rank == config.rank for rank in ranks.values()):
        return {}
    rslora = config.scaling == "rslora"
    alphas = {name: config.scale * (math.sqrt(rank) if rslora else rank) for name, rank in ranks.items()}
    alphas = {name: config.alpha if ranks[name] == config.rank else alpha for name, alpha in alphas.items()}
    return {"rank_pattern": patterns(ranks, config.rank), "alpha_pattern": patterns(alphas, config.alpha)}


def name_in_peft(module: str, config: Mapping[str, Any]) -> str:
    """What PEFT's patterns are matched with: the name of its weight for a module that is among `target_parameters`."""
    weight = f"{module}.weight"
    targets = config.get("target_parameters") or ()
    return weight if any(weight == name or weight.endswith(f".{name}") for name in targets) else module


def scale_of(name: str, rank: int, config: Mapping[str, Any]) -> float:
    """α/√r (rsLoRA) or α/r, with the layer's own α where `alpha_pattern` has one."""
    alpha = float(find_value(config.get("alpha_pattern"), name, config["lora_alpha"]))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
