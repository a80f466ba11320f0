"""The loss after the step over a grid of γ, and what the search for γ finds on these curves, in how many passes.

    python benchmarks/gamma_curves.py       # table, and benchmarks/results/gamma_curves.json

The gradient is of some rows, the losses are of others. Models and rows are those of choose_gamma.py. The search is run
on the curves, between their points by a cubic, so that another rule can be tried without the models: with all cases in
the JSON only the table is made anew. Stopped and started again it goes on after the last case that is there.
"""

from __future__ import annotations

import argparse
import logging
import math
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from choose_gamma import EXAMPLE, MODELS, opened, write_sentences
from resuming import earlier_runs, write_runs

from loraone_init import DataOptions, InitConfig, initialize, load_sample
from loraone_init.adapter.wording import count
from loraone_init.choosing.gamma import Trials, find_gamma
from loraone_init.initialization.evaluation import LossEvaluator, applied, first_order_fall
from loraone_init.layers.targets import select_targets
from loraone_init.monitor import Monitor
from loraone_init.processes.processes import Alone
from loraone_init.streaming.stack import BlockStack

HERE = Path(__file__).parent
SETTINGS = {"max_length": 128, "alpha": InitConfig.alpha}
PER_DOUBLING = 2
"""Points of a curve."""


@dataclass(frozen=True)
class Case:
    """rows, held_out: of the gradient and of the losses. least, doublings: the grid of γ."""

    model: str
    rows: int
    held_out: int
    seed: int
    rank: int
    least: float
    doublings: float

    @property
    def key(self) -> tuple[Any, ...]:
        return self.model, self.rows, self.held_out, self.seed, self.rank


CASES = (
    *(Case(MODELS[1], 256, 64, seed, rank, 4.0, 7.5) for seed in (0, 1, 2) for rank in (8, 32)),
    *(Case(MODELS[1], 64, 64, 1, rank, 4.0, 8.5) for rank in (8, 2)),
    *(Case(MODELS[1], 64, 16, 2, rank, 4.0, 8.5) for rank in (8, 32)),
    *(Case(MODELS[1], 64, 8, 0, rank, 8.0, 7.5) for rank in (8, 32)),
    *(Case(MODELS[1], 256, 16, 3, rank, 4.0, 7.5) for rank in (8, 32)),
    *(Case(MODELS[0], 8, 8, 0, rank, 64.0, 3.5) for rank in (8, 32)),
    *(Case(MODELS[0], 32, 8, 1, rank, 64.0, 3.5) for rank in (8, 2)),
    Case(MODELS[0], 8, 8, 2, 8, 64.0, 3.5),
    *(Case(MODELS[0], 16, 8, 3, rank, 64.0, 4.5) for rank in (8, 1)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "gamma_curves.json")
    arguments = parser.parse_args()
    logging.getLogger("loraone_init").setLevel(logging.ERROR)
    runs = earlier_runs(arguments.output, SETTINGS)
    with tempfile.TemporaryDirectory() as directory:
        sentences = write_sentences(Path(directory) / "sentences.jsonl")
        for case in CASES:
            if all(key_of(run) != case.key for run in runs):
                runs.append(measure(case, EXAMPLE if case.model == MODELS[0] else sentences))
                write_runs(arguments.output, SETTINGS, runs)
    print(markdown(runs))


def key_of(run: dict[str, Any]) -> tuple[Any, ...]:
    return run["model"], run["rows"], run["held_out"], run["seed"], run["rank"]


def measure(case: Case, data: Path) -> dict[str, Any]:
    """The losses of one case, and the slope that the gradient promises."""
    model, objective, data = opened(case.model, data, case.seed)
    assert model.tokenizer is not None
    options = DataOptions(
        samples=case.rows,
        held_out=case.held_out,
        max_length=int(SETTINGS["max_length"]),
        seed=case.seed,
        task=model.task,
    )
    sample = load_sample(str(data), model.tokenizer, options, labels=model.labels)
    config = InitConfig(rank=case.rank, gamma=1.0, seed=case.seed)
    adapter = initialize(model, replace(sample, held_out=[]), config)
    evaluator = LossEvaluator(BlockStack.of(model), objective, Monitor(), Alone())
    targets = select_targets(model.module, "all-linear", saved=model.saved)

    def loss_at(gamma: float) -> float:
        with applied(adapter.pairs, targets, config.scale, gamma):
            return evaluator.mean_loss(sample.held_out_batches)[0]

    grid = [case.least * 2 ** (k / PER_DOUBLING) for k in range(round(PER_DOUBLING * case.doublings) + 1)]
    return {
        **dict(zip(("model", "rows", "held_out", "seed", "rank"), case.key, strict=True)),
        "before": evaluator.mean_loss(sample.held_out_batches)[0],
        "slope": first_order_fall(adapter.layers, config.scale),
        "curve": [(gamma, loss_at(gamma)) for gamma in grid],
    }


def interpolated(curve: list[tuple[float, float]], before: float) -> Callable[[float], float]:
    """The loss for any γ: the cubic in log γ through the four nearest points; beyond them in proportion to 1/γ for
    shorter steps, to log γ for longer ones.
    """

    def loss(gamma: float) -> float:
        if gamma >= curve[-1][0]:
            return before + (curve[-1][1] - before) * curve[-1][0] / gamma
        x = math.log2(gamma)
        known = [(math.log2(point), value) for point, value in curve]
        if gamma < curve[0][0]:
            (x0, first), (x1, second) = known[:2]
            return first + (second - first) * (x - x0) / (x1 - x0)
        nearest = sorted(known, key=lambda point: abs(point[0] - x))[:4]
        total = 0.0
        for x0, value in nearest:
            total += value * math.prod((x - x1) / (x0 - x1) for x1, _ in nearest if x1 != x0)
        return total

    return loss


def search(run: dict[str, Any]) -> tuple[float, float, int]:
    """(γ, the loss with it, forward passes) of the search on a case's curve."""
    trials = Trials(interpolated(run["curve"], run["before"]))
    gamma = find_gamma(trials, run["before"], run["slope"], InitConfig(rank=run["rank"]).scale)
    return gamma, trials(gamma), 1 + len(trials.curve)


def markdown(runs: list[dict[str, Any]]) -> str:
    """A line for each case, then how many of them took how many passes."""
    lines = [
        "| model, rows of the gradient, held out | rank | seed | before | γ = 128 | best of the grid | at γ"
        " | found | at γ | passes |\n|" + "---|" * 10
    ]
    passes: Counter[int] = Counter()
    for run in runs:
        gamma, loss, number = search(run)
        best = min(run["curve"], key=lambda point: point[1])
        at_128 = interpolated(run["curve"], run["before"])(128.0)
        cells = [f"{run['model']}, {run['rows']}, {run['held_out']}", run["rank"], run["seed"], f"{run['before']:.3f}"]
        cells += [f"{at_128:.3f}", f"{best[1]:.3f}", f"{best[0]:.3g}", f"{loss:.3f}", f"{gamma:g}", number]
        lines.append(f"| {' | '.join(map(str, cells))} |")
        passes[number] += 1
    told = ", ".join(f"{number} in {count(cases, 'case')}" for number, cases in sorted(passes.items()))
    return "\n".join([*lines, "", f"Passes: {told}."])


if __name__ == "__main__":
    main()
