"""Time of one optimizer step: PreconditionedAdamW, fused AdamW alone, and PEFT's Riemannian optimizer.

    python benchmarks/optimizer.py       # about two minutes on 2 cores; table, and benchmarks/results/optimizer.json
    python benchmarks/optimizer.py --device cuda --output benchmarks/results/optimizer-cuda.json

The 210 pairs of SmolLM2-135M (every linear layer of its 30 blocks) with random values, fp32, at r = 8 and r = 64, all
on fused AdamW. The optimizers take turns, one step each, and every repeat starts anew; given is the median over the
repeats of each repeat's median step. Wall time, and this process's CPU time, which other work on the machine hardly
changes.

Beside it, forward and backward of one micro-batch of 4 rows of 256 tokens through SmolLM2-135M (random weights) with
those pairs: what a step costs of the shortest training step that uses them.
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
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_riemannian_optimizer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

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
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
ROWS, TOKENS = 4, 256
DAMPING = 1e-2  # PEFT's default
OURS, ALONE, PEFT = "PreconditionedAdamW", "fused AdamW", "PEFT Riemannian"
TRAINING = "forward and backward"

Milliseconds = tuple[float, float]
"""Of wall time, and of this process's CPU time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30, help="of each optimizer in each repeat")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "optimizer.json")
    arguments = parser.parse_args()

    result: dict[str, Any] = {"machine": machine(arguments.device), "repeats": arguments.repeats, "ranks": {}}
    for rank in arguments.ranks:
        repeats = [one_repeat(rank, arguments.device, arguments.steps) for _ in range(arguments.repeats)]
        result["ranks"][str(rank)] = {name: summary([repeat[name] for repeat in repeats]) for name in repeats[0]}
        micro_batches = forward_and_backward(rank, arguments.device, arguments.repeats)
        result["ranks"][str(rank)][TRAINING] = summary(micro_batches)
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    print_table(result)


def summary(times: list[Milliseconds]) -> dict[str, Any]:
    """Medians over the repeats, and each of them."""
    return {
        clock: {"median": median(values), "repeats": list(values)}
        for clock, values in zip(("wall", "cpu"), zip(*times, strict=True), strict=True)
    }


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


def one_repeat(rank: int, device: torch.device, steps: int) -> dict[str, Milliseconds]:
    """Median times of a step of each, after two that are not counted."""
    competitors = optimizers(rank, device)
    times: dict[str, list[Milliseconds]] = {name: [] for name in competitors}
    gradients = {name: [p.grad.clone() for p in o.param_groups[0]["params"]] for name, o in competitors.items()}
    for _ in range(steps + 2):
        for name, optimizer in competitors.items():
            for parameter, gradient in zip(optimizer.param_groups[0]["params"], gradients[name], strict=True):
                parameter.grad.copy_(gradient)  # PEFT overwrites it
            times[name].append(milliseconds(optimizer.step, device))
    walls_and_cpus = {name: zip(*values[2:], strict=True) for name, values in times.items()}
    return {name: (median(walls), median(cpus)) for name, (walls, cpus) in walls_and_cpus.items()}


def forward_and_backward(rank: int, device: torch.device, repeats: int) -> list[Milliseconds]:
    """Times of one micro-batch, after one that is not counted."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SMOLLM2))
    model = get_peft_model(base, LoraConfig(r=rank, target_modules="all-linear")).to(device)
    tokens = torch.randint(SMOLLM2["vocab_size"], (ROWS, TOKENS), device=device)

    def micro_batch() -> None:
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()

    return [milliseconds(micro_batch, device) for _ in range(repeats + 1)][1:]


def milliseconds(step: Callable[[], object], device: torch.device) -> Milliseconds:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3


def clock_of(result: dict[str, Any]) -> str:
    """What is compared: the CPU time on a CPU, and the wall time on a GPU."""
    return "cpu" if result["machine"]["device"] == "cpu" else "wall"


def share_of_training(cases: dict[str, Any], name: str, clock: str) -> float:
    """Of the time of forward, backward and step, the step's."""
    step, rest = cases[name][clock]["median"], cases[TRAINING][clock]["median"]
    return float(step / (step + rest))


def sentences(result: dict[str, Any]) -> list[str]:
    """What docs/training.md says of each rank."""
    clock = clock_of(result)
    return [
        f"r = {rank}: {cases[OURS][clock]['median'] / cases[ALONE][clock]['median']:.1f} times fused AdamW,"
        f" {share_of_training(cases, OURS, clock):.1%} of the training step"
        for rank, cases in result["ranks"].items()
    ]


def print_table(result: dict[str, Any]) -> None:
    clock = clock_of(result)
    print(f"{'rank':>4}  {'step':<20} {'wall ms':>8} {'CPU ms':>8} {'range':>15} {'× AdamW':>8} {'of training':>12}")
    for rank, cases in result["ranks"].items():
        for name, case in cases.items():
            wall, cpu, all_of_them = case["wall"]["median"], case["cpu"]["median"], case[clock]["repeats"]
            spread = f"{min(all_of_them):.1f}-{max(all_of_them):.1f}"
            share = 1.0 if name == TRAINING else share_of_training(cases, name, clock)
            times = case[clock]["median"] / cases[ALONE][clock]["median"]
            print(f"{rank:>4}  {name:<20} {wall:8.1f} {cpu:8.1f} {spread:>15} {times:8.2f} {share:12.2%}")


if __name__ == "__main__":
    main()
