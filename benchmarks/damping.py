"""Which preconditioner, and how much damping: held-out loss after a short training of SmolLM2 from the spectral start.

    python benchmarks/damping.py            # about 40 minutes on 2 cores; table, and benchmarks/results/damping.json

Stopped and started again it goes on after the last run that is in the JSON.

Every variant gets every learning rate. Held-out rows are the last of examples/gsm8k.jsonl; neither the initialisation
nor the training sees them.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from resuming import earlier_runs, write_runs

from loraone_init import Adapter, DataOptions, InitConfig, initialize, load_sample, open_model
from loraone_init.adapter.records import Preconditioner
from loraone_init.data.sample import Sample
from loraone_init.models.sources import LocalModel, resolve_model
from loraone_init.training import TrainOptions, train

HERE = Path(__file__).parent
VARIANTS = [
    None,
    Preconditioner("absolute", 1e-6),
    Preconditioner("scale-free", 1e-2),
    Preconditioner("scale-free", 1e-1),
    Preconditioner("absolute", 1e-3),
]
LEARNING_RATES = (5e-4, 1e-3, 2e-3, 4e-3)
HELD_OUT = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--samples", type=int, default=16, help="rows of the initialisation")
    parser.add_argument("--gamma", type=float, default=256.0)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "damping.json")
    arguments = parser.parse_args()
    logging.getLogger("loraone_init").setLevel(logging.ERROR)

    source = resolve_model("demo")
    with tempfile.TemporaryDirectory() as directory:
        training, held_out = split_rows(source, Path(directory))
        adapter = initial_adapter(source, Path(directory) / "train.jsonl", arguments.samples, arguments.gamma)
        settings = {"max_steps": arguments.steps, "batch_size": arguments.batch_size, "device": "cpu"}
        result = {**settings, "samples": arguments.samples, "gamma": arguments.gamma, "held_out": HELD_OUT}
        runs = earlier_runs(arguments.output, result)
        for rate in LEARNING_RATES:
            for variant in VARIANTS:
                if any(key(done) == (rate, *described(variant)) for done in runs):
                    continue
                runs.append(run(source, adapter, training, held_out, variant, rate, settings, Path(directory)))
                write_runs(arguments.output, result, runs)
    print_table(runs)


def described(variant: Preconditioner | None) -> tuple[str, float | None]:
    return (variant.kind, variant.damping) if variant else ("none", None)


def key(run: dict[str, Any]) -> tuple[float, str, float | None]:
    return run["learning_rate"], run["kind"], run["damping"]


def split_rows(source: LocalModel, work: Path) -> tuple[Sample, Sample]:
    """All rows but the last, and the last."""
    lines = (HERE.parent / "examples" / "gsm8k.jsonl").read_text().splitlines(keepends=True)
    (work / "train.jsonl").write_text("".join(lines[:-HELD_OUT]))
    (work / "held-out.jsonl").write_text("".join(lines[-HELD_OUT:]))
    tokenizer = open_model(str(source.directory), weights=False).tokenizer
    assert tokenizer is not None
    options = DataOptions(samples=10**6, max_length=256)
    training, held_out = (
        load_sample(str(work / name), tokenizer, options) for name in ("train.jsonl", "held-out.jsonl")
    )
    return training, held_out


def initial_adapter(source: LocalModel, data: Path, samples: int, gamma: float) -> Adapter:
    model = open_model(str(source.directory))
    assert model.tokenizer is not None
    sample = load_sample(str(data), model.tokenizer, DataOptions(samples=samples, max_length=256))
    return initialize(model, sample, InitConfig(gamma=gamma))


def run(
    source: LocalModel,
    adapter: Adapter,
    training: Sample,
    held_out: Sample,
    variant: Preconditioner | None,
    rate: float,
    settings: dict[str, Any],
    work: Path,
) -> dict[str, Any]:
    """Held-out loss before and after one training."""
    options = TrainOptions(
        **settings, learning_rate=rate, schedule="cosine", optimizer="preconditioned" if variant else "adamw"
    )
    start = replace(adapter, preconditioner=variant) if variant else adapter
    outcome = train(source, start, training, work / "run", options, evaluation=held_out)
    record = outcome.adapter.training
    assert record is not None
    kind, damping = described(variant)
    losses = {"before": record["first_eval_loss"], "after": record["last_eval_loss"]}
    print(f"{rate:8.0e} {kind:12} {damping!s:8} {losses['before']:.4f} {losses['after']:.4f}", flush=True)
    return {"learning_rate": rate, "kind": kind, "damping": damping, **losses}


def print_table(runs: list[dict[str, Any]]) -> None:
    print(f"\n{'held-out loss after':24}" + "".join(f"{rate:>10.0e}" for rate in LEARNING_RATES))
    after = {key(run): run["after"] for run in runs}
    for variant in VARIANTS:
        kind, damping = described(variant)
        row = [after[rate, kind, damping] for rate in LEARNING_RATES]
        print(f"{kind:14}{damping!s:10}" + "".join(f"{loss:10.4f}" for loss in row))


if __name__ == "__main__":
    main()
