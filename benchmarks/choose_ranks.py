"""Which layers get the ranks of a budget: uniform ranks against rules that allot them by the spectra, on SmolLM2.

    python benchmarks/choose_ranks.py     # about an hour on 2 cores; a table, and benchmarks/results/choose_ranks.json

Gradients are of 16 rows of examples/gsm8k.jsonl; the loss after the step is on 16 rows that are never among these. A
rule is what a further rank of a layer is worth, for its cost:

    energy    σᵢ²/‖G‖²   the share of its own energy that a layer captures
    absolute  σᵢ²        the energy of all gradients together
    step      σᵢ²/σ₁²    the energy of the step that is taken: it has the length s/γ in every layer
    descent   σᵢ²/σ₁     what that step lowers the loss by, to first order

"uniform + 1" is a control: what a rank more in every layer brings, at the same s.

The cost is 1 for each rank, or its parameters, in + out ("…/parameters"); the budget is what uniform ranks cost. Once
stopped, it goes on after the last run that is in the JSON. Trainings come last (--steps 0 leaves them out).
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from loraone_init import Adapter, DataOptions, InitConfig, initialize, load_sample, open_model, truncated_svd
from loraone_init.choosing.rank_allotment import allot
from loraone_init.config import MAX_TIMES, RankBudget
from loraone_init.data.sample import Sample
from loraone_init.gradients.causal_lm import CausalLM
from loraone_init.gradients.stream import stream_gradients
from loraone_init.initialization.evaluation import applied
from loraone_init.layers.targets import select_targets
from loraone_init.linalg.factors import LoraPair, spectral_init
from loraone_init.linalg.seeding import layer_generator
from loraone_init.linalg.svd import TruncatedSVD
from loraone_init.models.opening import OpenModel
from loraone_init.models.sources import resolve_model
from loraone_init.streaming.stack import BlockStack
from loraone_init.training import TrainOptions, train

HERE = Path(__file__).parent
HELD_OUT = 16
SAMPLES = 16
MAX_LENGTH = 160
GAMMA = 256.0
AVERAGES = (8, 4, 16)
SEEDS = (0, 1, 2)
LEARNING_RATE = 2e-3

Gain = Callable[[TruncatedSVD, float], float]
GAINS: dict[str, Gain] = {
    "energy": lambda svd, sigma: (sigma / svd.norm) ** 2,
    "absolute": lambda svd, sigma: sigma**2,
    "step": lambda svd, sigma: (sigma / float(svd.S[0])) ** 2,
    "descent": lambda svd, sigma: sigma**2 / float(svd.S[0]),
}
RULES = ("uniform", "uniform + 1", *GAINS, *(f"{gain}/parameters" for gain in GAINS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--averages", type=int, nargs="+", default=list(AVERAGES))
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--steps", type=int, default=20, help="of the trainings at an average of 8")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "choose_ranks.json")
    arguments = parser.parse_args()
    logging.getLogger("loraone_init").setLevel(logging.ERROR)
    result = read_result(arguments.output)
    with tempfile.TemporaryDirectory() as directory:
        training, held_out = split_rows(Path(directory))
        for seed in arguments.seeds:
            wanted = [(average, rule) for average in arguments.averages for rule in arguments.rules]
            done = {(run["average"], run["rule"]) for run in result["runs"] if run["seed"] == seed}
            if missing := [case for case in wanted if case not in done]:
                measure_steps(training, held_out, seed, missing, result, arguments.output)
        if arguments.steps:
            compare_trainings(training, held_out, arguments.steps, Path(directory), result, arguments.output)
    print("\n".join(markdown(result)))


def read_result(output: Path) -> dict[str, Any]:
    """What an interrupted call left, or the empty beginning."""
    settings = {"samples": SAMPLES, "max_length": MAX_LENGTH, "gamma": GAMMA, "held_out": HELD_OUT}
    if output.exists():
        found: dict[str, Any] = json.loads(output.read_text())
        if {key: found[key] for key in settings} == settings:
            return found
    return {**settings, "runs": [], "training": []}


def split_rows(work: Path) -> tuple[Path, Path]:
    """All rows but the last, and the last."""
    lines = (HERE.parent / "examples" / "gsm8k.jsonl").read_text().splitlines(keepends=True)
    training, held_out = work / "train.jsonl", work / "held-out.jsonl"
    training.write_text("".join(lines[:-HELD_OUT]))
    held_out.write_text("".join(lines[-HELD_OUT:]))
    return training, held_out


def measure_steps(
    training: Path, held_out: Path, seed: int, cases: list[tuple[int, str]], result: dict[str, Any], output: Path
) -> None:
    """Captured energy, parameters and the held-out loss after the step, of every (average, rule)."""
    opened = open_model("demo", placement="device")
    sample, held = load(opened, training, seed), load(opened, held_out, 0, 10**6)
    svds = decompose(opened, sample, MAX_TIMES * max(average for average, _ in cases), seed)
    for average, rule in cases:
        ranks = choose(svds, average, rule)
        scale = InitConfig(rank=average).scale
        pairs = {name: factors(svd.first(ranks[name]), name, seed) for name, svd in svds.items()}
        energies = [svd.first(ranks[name]).captured_energy for name, svd in svds.items()]
        run = {
            "seed": seed,
            "average": average,
            "rule": rule,
            "parameters": sum(pair.A.numel() + pair.B.numel() for pair in pairs.values()),
            "ranks": [min(ranks.values()), median(ranks.values()), max(ranks.values())],
            "energy_min": min(energies),
            "energy_median": median(energies),
            "loss": held_out_loss(opened, held, pairs, scale),
        }
        result["runs"].append(run)
        print(run, flush=True)
        write(result, output)


def load(opened: OpenModel, data: Path, seed: int, samples: int = SAMPLES) -> Sample:
    assert opened.tokenizer is not None
    return load_sample(str(data), opened.tokenizer, DataOptions(samples=samples, max_length=MAX_LENGTH, seed=seed))


def decompose(opened: OpenModel, sample: Sample, rank: int, seed: int) -> dict[str, TruncatedSVD]:
    """Of all layers' gradients."""
    targets = select_targets(opened.module, "all-linear")
    objective = CausalLM(opened.module, opened.device)
    svds = {}
    _, gradients = stream_gradients(BlockStack.of(opened), targets, objective, sample.batches)
    for gradient in gradients:
        most = min(rank, *gradient.G.shape)
        svds[gradient.name] = truncated_svd(gradient.G, most, generator=layer_generator(seed, gradient.name))
    return {name: svds[name] for name in targets}


def choose(svds: Mapping[str, TruncatedSVD], average: int, rule: str) -> dict[str, int]:
    """The rank of every layer."""
    if rule in ("uniform", "uniform + 1"):
        return dict.fromkeys(svds, average + (rule != "uniform"))
    gain, _, by_parameters = rule.partition("/")
    sizes = [len(svd.U) + svd.Vh.shape[1] for svd in svds.values()]
    costs = sizes if by_parameters else [1] * len(svds)
    limits = RankBudget(average).limits({name: (len(svd.U), svd.Vh.shape[1]) for name, svd in svds.items()})
    gains = [[GAINS[gain](svd, sigma) for sigma in svd.S[: limits[name]].tolist()] for name, svd in svds.items()]
    return dict(zip(svds, allot(gains, costs, average * sum(costs)), strict=True))


def factors(svd: TruncatedSVD, name: str, seed: int) -> LoraPair:
    return spectral_init(svd.U, svd.S, svd.Vh, GAMMA, layer_generator(seed, name), rank=svd.rank)


def held_out_loss(opened: OpenModel, held: Sample, pairs: Mapping[str, LoraPair], scale: float) -> float:
    """Mean over label tokens; the whole model is in memory."""
    total, count = 0.0, 0
    with torch.no_grad(), applied(pairs, select_targets(opened.module, "all-linear"), scale):
        for batch in held.batches:
            logits = opened.module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            labels = batch["labels"][:, 1:].flatten()
            total += float(cross_entropy(logits[:, :-1].flatten(0, 1), labels, ignore_index=-100, reduction="sum"))
            count += int((labels != -100).sum())
    return total / count


def compare_trainings(
    training: Path, held_out: Path, steps: int, work: Path, result: dict[str, Any], output: Path
) -> None:
    """Held-out loss before and after a short training, of rank 8 and of a budget of 8 on average."""
    source = resolve_model("demo")
    for seed in SEEDS[:1]:
        for name, config in (("uniform", InitConfig(rank=8)), ("budget", InitConfig(rank_budget=RankBudget(8)))):
            if any((run["seed"], run["start"], run["steps"]) == (seed, name, steps) for run in result["training"]):
                continue
            opened = open_model(str(source.directory))
            start = initialize(opened, load(opened, training, seed), replace(config, gamma=GAMMA, seed=seed))
            rows, held = load(opened, training, seed, 10**6), load(opened, held_out, 0, 10**6)
            options = TrainOptions(
                max_steps=steps, batch_size=4, device="cpu", learning_rate=LEARNING_RATE, schedule="cosine", seed=seed
            )
            trained = train(source, start, rows, work / "run", options, evaluation=held).adapter
            result["training"].append({"seed": seed, "start": name, "steps": steps, **outcome(trained)})
            write(result, output)


def outcome(trained: Adapter) -> dict[str, Any]:
    record = trained.training or {}
    losses = {"before": record["first_eval_loss"], "after": record["last_eval_loss"]}
    print(losses, flush=True)
    return {"parameters": trained.num_parameters, "learning_rate": LEARNING_RATE, **losses}


def write(result: dict[str, Any], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")


def markdown(result: dict[str, Any]) -> list[str]:
    """The tables of docs/choosing.md: means over seeds; of the loss, of the differences to uniform ranks by seed."""
    runs = {(run["average"], run["rule"], run["seed"]): run for run in result["runs"]}
    lines = [
        "| average | rule | seeds | parameters | ranks | captured min | median | held-out loss |",
        "|" + "---|" * 8,
    ]
    for average, rule in sorted({key[:2] for key in runs}, key=lambda case: (case[0], RULES.index(case[1]))):
        some = [run for key, run in runs.items() if key[:2] == (average, rule)]
        bases = [runs[average, "uniform", run["seed"]]["loss"] for run in some]
        loss = f"{mean(bases):.4f}"
        if rule != "uniform":
            loss = f"{mean(run['loss'] - base for run, base in zip(some, bases, strict=True)):+.4f}"
        least, most = min(run["ranks"][0] for run in some), max(run["ranks"][2] for run in some)
        lines.append(
            f"| {average} | {rule} | {len(some)} | {mean(run['parameters'] for run in some):,.0f} |"
            f" {least if least == most else f'{least} to {most}'} |"
            f" {mean(run['energy_min'] for run in some):.1%} | {mean(run['energy_median'] for run in some):.1%} |"
            f" {loss} |"
        )
    return [*lines, *_trainings(result["training"])]


def _trainings(runs: list[dict[str, Any]]) -> list[str]:
    if not runs:
        return []
    lines = ["", "| start | seed | steps | parameters | loss before | after |", "|" + "---|" * 6]
    for run in runs:
        lines.append(
            f"| {run['start']} | {run['seed']} | {run['steps']} | {run['parameters']:,} |"
            f" {run['before']:.4f} | {run['after']:.4f} |"
        )
    return lines


if __name__ == "__main__":
    main()
