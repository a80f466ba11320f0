"""What a run would do and need, without doing it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, get_args

from torch import nn

from ..adapter.wording import count, describe_ranks, describe_sample
from ..choosing.sample_size import Growth
from ..config import AUTO, Auto, InitConfig, Schedule
from ..data.sample import Sample
from ..initialization.estimate import Memory, estimate_memory, estimate_seconds, matrix_rate
from ..initialization.evaluation import expected_passes, num_evaluated
from ..initialization.layer_starts import rank_limits
from ..initialization.peft_check import taken_by_peft
from ..initialization.schedule import Plan, choose_schedule
from ..layers.experts import ExpertLinear
from ..layers.targets import layer_shape, left_out_layers, select_targets
from ..machine import describe_size, used_memory
from ..models.opening import OpenModel
from ..models.placement import Place
from ..terminal import print_facts
from .summary import left_out_facts


def plan(
    opened: OpenModel,
    sample: Sample,
    config: InitConfig,
    growth: Growth | None = None,
    schedule: Schedule | Auto = AUTO,
    max_memory: int | None = None,
) -> dict[str, Any]:
    """What --dry-run tells of a model opened without weights. Raises the errors that `initialize` would.

    growth: of the sample, which is then all rows that it may have; the figures are those of growing up to them.
    """
    targets = select_targets(
        opened.module, config.target_modules, config.exclude_modules, opened.saved, config.vision_layers
    )
    targets = taken_by_peft(opened.module, targets, config, opened.directory)
    config, limits = rank_limits(targets, config)
    budget = config.rank_budget
    ranks = sum(limits.values()) if budget is None else budget.total(len(limits))
    own_ranks = limits if budget is None else dict.fromkeys(limits, ranks / len(limits))
    kinds = Counter((_kind(name, module), layer_shape(module)) for name, module in targets.items())
    chosen = choose_schedule(
        schedule, opened, targets, [*sample.batches, *sample.held_out_batches], max_memory, growth is not None, limits
    )
    sizes = growth.sizes(len(sample.rows)) if growth else [len(sample.rows)]
    program = used_memory(opened.device)
    held_out = len(sample.held_out)
    evaluated = (held_out or num_evaluated(len(sample.rows))) * expected_passes(config.gamma, bool(held_out))
    more_samples, rate = sum(sizes) / sizes[-1], matrix_rate(opened.device)
    costs = {}
    for kind in get_args(Schedule):
        memory = estimate_memory(opened, targets, sample.batches, growth is not None, limits, kind, chosen.most_tokens)
        seconds = estimate_seconds(opened, targets, sample.batches, sample.num_label_tokens, evaluated, kind, rate)
        total = program + _resident(memory, chosen).total
        costs[kind] = {"memory_bytes": total, "seconds": round(seconds * more_samples, 1)}
    needs = _resident(chosen.needs, chosen)
    return {
        "base": opened.name,
        "layers": [{"name": name, "shape": shape, "count": number} for (name, shape), number in kinds.items()],
        "vision_layers_left_out": 0 if config.vision_layers else left_out_layers(opened.module),
        "rank": config.rank,
        "smaller_ranks": {} if budget else {name: rank for name, rank in limits.items() if rank < config.rank},
        "gamma": config.gamma,
        "rank_budget": None if budget is None else {"total": ranks, "least": 1, "most": max(limits.values())},
        "parameters": _count_parameters(targets, own_ranks),
        "sample": sample.facts(),
        "growth": {"samples": sizes, "tolerance": growth.tolerance} if growth else None,
        "device": str(opened.device),
        "dtype": str(next(iter(targets.values())).weight.dtype).removeprefix("torch."),
        "placement": opened.placement,
        "schedule": {"chosen": chosen.schedule, "why": chosen.why, **costs},
        "memory_bytes": {"program": program, **asdict(needs), "total": program + needs.total},
        "seconds": costs[chosen.schedule]["seconds"],
    }


def _resident(memory: Memory, chosen: Plan) -> Memory:
    """Without the block inputs that go to a file."""
    return memory if chosen.device_bytes is None else replace(memory, inputs=min(memory.inputs, chosen.device_bytes))


def _count_parameters(targets: Mapping[str, nn.Module], ranks: Mapping[str, float]) -> int:
    return round(sum(ranks[name] * sum(layer_shape(module)) for name, module in targets.items()))


def _kind(name: str, module: nn.Module) -> str:
    """q_proj; for one expert's matrix experts.down_proj."""
    return f"experts.{module.parameter}" if isinstance(module, ExpertLinear) else name.rpartition(".")[2]


def print_plan(content: Mapping[str, Any], as_json: bool) -> None:
    """JSON on standard output, or a table."""
    if as_json:
        print(json.dumps(content, indent=2, allow_nan=False))
        return
    memory = content["memory_bytes"]
    budget = content["rank_budget"]
    ranks = f"of rank {content['rank']}"
    if smaller := content["smaller_ranks"]:
        ranks += f", or what their shapes allow: {describe_ranks([*smaller.values()])} in {len(smaller)} of them"
    if budget:
        ranks = f"of {budget['total']:,} ranks together, {budget['least']} to {budget['most']} each"
    parts = {
        "program": "program",
        "outside": "weights that stay",
        "block": "weights that come and go",
        "gradients": "gradients",
        "inputs": "inputs of blocks",
        "working": "a micro-batch",
    }
    at_most = "at most " if content["growth"] else ""
    facts = [
        ("base", str(content["base"])),
        ("layers", f"{sum(kind['count'] for kind in content['layers'])} {ranks}"),
        *[
            ("", f"{kind['count']} × {kind['name']} {kind['shape'][0]}×{kind['shape'][1]}")
            for kind in content["layers"]
        ],
        *left_out_facts(content),
        ("parameters", f"{content['parameters']:,}{' if all ranks were equal' if budget else ''}"),
        ("data", at_most + describe_sample(content["sample"])),
        *([("samples", _describe_growth(content["growth"]))] if content["growth"] else []),
        ("computed in", f"{content['dtype']} on {content['device']}"),
        ("placement", _PLACEMENTS[content["placement"]]),
        ("schedule", f"{content['schedule']['chosen']}: {content['schedule']['why']}"),
        *[("", _describe_cost(name, content["schedule"][name])) for name in get_args(Schedule)],
        ("memory", f"about {describe_size(memory['total'])}"),
        *[("", f"{describe_size(memory[key])} {what}") for key, what in parts.items()],
        (
            "time",
            f"{at_most}about {count(max(1, round(content['seconds'])), 'second')}, by this machine's matrix rate now",
        ),
    ]
    print_facts(facts)


def _describe_cost(schedule: str, cost: Mapping[str, Any]) -> str:
    seconds = count(max(1, round(cost["seconds"])), "second")
    return f"{schedule}: about {describe_size(cost['memory_bytes'])}, {seconds}"


def _describe_growth(growth: Mapping[str, Any]) -> str:
    sizes = ", ".join(map(str, growth["samples"]))
    return f"{sizes}, until two halves agree to {1 - growth['tolerance']:g}"


_PLACEMENTS: dict[Place, str] = {
    "disk": "disk: blocks are read from the checkpoint when they are needed",
    "host": "host: the whole model is held in host memory, and blocks are copied to the device when they are needed",
    "device": "device: the whole model is held in the device's memory",
}
