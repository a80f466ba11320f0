"""Time of one optimizer step: PreconditionedAdamW, fused AdamW alone, and PEFT's Riemannian optimizer.

    python benchmarks/optimizer.py       # about a minute on 2 cores; table, and benchmarks/results/optimizer.json
    python benchmarks/optimizer.py --device cuda --output benchmarks/results/optimizer-cuda.json

The 210 pairs of SmolLM2-135M (every linear layer of its 30 blocks) with random values, fp32, at r = 8 and r = 64, all
on fused AdamW. The optimizers take turns, one step each, and every repeat starts anew; given is the median over the
repeats of each repeat's median step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft.optimizers import create_riemannian_optimizer
from torch import nn

from loraone_init import PreconditionedAdamW
from loraone_init.adapter.records import Preconditioner

BLOCKS = 30
LAYERS = {  # (out, in) of SmolLM2-135M
    "q_proj": (576, 576),
    "k_proj": (192, 576),
    "v_proj": (192, 576),
    "o_proj": (576, 576),
    "gate_proj": (1536, 576),
    "up_proj": (1536, 576),
    "down_proj": (576, 1536),
}
DAMPING = 1e-2  # PEFT's default
OURS, ALONE, PEFT = "PreconditionedAdamW", "fused AdamW", "PEFT Riemannian"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="of each optimizer in each repeat")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "optimizer.json")
    arguments = parser.parse_args()

    result: dict[str, Any] = {"machine": machine(arguments.device), "repeats": arguments.repeats, "milliseconds": {}}
    for rank in arguments.ranks:
        repeats = [one_repeat(rank, arguments.device, arguments.steps) for _ in range(arguments.repeats)]
        result["milliseconds"][str(rank)] = {
            name: {"median": median(times), "repeats": times}
            for name, times in ((name, [repeat[name] for repeat in repeats]) for name in repeats[0])
        }
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print_table(result)


def machine(device: torch.device) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }


def lora_model(rank: int, device: torch.device) -> nn.Module:
    """Modules by the names that PEFT gives them, with random factors and gradients; the base layers are left out."""
    generator = torch.Generator().manual_seed(0)
    model = nn.ModuleDict()
    for block in range(BLOCKS):
        for name, (out, into) in LAYERS.items():
            layer = nn.Module()
            layer.lora_A = nn.ModuleDict({"default": nn.Linear(into, rank, bias=False)})
            layer.lora_B = nn.ModuleDict({"default": nn.Linear(rank, out, bias=False)})
            model[f"{block}_{name}"] = layer
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).div_(rank).to(device)
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
    return model


def optimizers(rank: int, device: torch.device) -> dict[str, torch.optim.Optimizer]:
    models = [lora_model(rank, device) for _ in range(3)]
    damping = Preconditioner("absolute", DAMPING)
    return {
        ALONE: torch.optim.AdamW(models[0].parameters(), lr=1e-6, fused=True),
        OURS: PreconditionedAdamW(models[1].parameters(), models[1], lr=1e-6, preconditioner=damping, fused=True),
        PEFT: create_riemannian_optimizer(models[2], torch.optim.AdamW, lr=1e-6, reg=DAMPING, fused=True),
    }


def one_repeat(rank: int, device: torch.device, steps: int) -> dict[str, float]:
    """Median milliseconds of a step of each, after two that are not counted."""
    competitors = optimizers(rank, device)
    times: dict[str, list[float]] = {name: [] for name in competitors}
    gradients = {name: [p.grad.clone() for p in o.param_groups[0]["params"]] for name, o in competitors.items()}
    for _ in range(steps + 2):
        for name, optimizer in competitors.items():
            for parameter, gradient in zip(optimizer.param_groups[0]["params"], gradients[name], strict=True):
                parameter.grad.copy_(gradient)  # PEFT overwrites it
            times[name].append(milliseconds(optimizer.step, device))
    return {name: median(values[2:]) for name, values in times.items()}


def milliseconds(step: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3


def print_table(result: dict[str, Any]) -> None:
    print(f"{'rank':>4}  {'optimizer':<20} {'ms/step':>8} {'range':>15} {'× AdamW':>8} {'× ours':>7}")
    for rank, cases in result["milliseconds"].items():
        for name, case in cases.items():
            middle, all_of_them = case["median"], case["repeats"]
            spread = f"{min(all_of_them):.1f}-{max(all_of_them):.1f}"
            to_alone, to_ours = middle / cases[ALONE]["median"], middle / cases[OURS]["median"]
            print(f"{rank:>4}  {name:<20} {middle:8.1f} {spread:>15} {to_alone:8.2f} {to_ours:7.2f}")


if __name__ == "__main__":
    main()
